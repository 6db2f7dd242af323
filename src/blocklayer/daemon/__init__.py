"""The daemon as an object: a live graph, its jobs and front ends, for Python; QMP is a skin on it."""
