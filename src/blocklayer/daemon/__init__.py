"""The daemon as an object: a live graph, its jobs and front ends; QMP is a skin on it."""
