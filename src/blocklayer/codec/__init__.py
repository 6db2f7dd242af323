"""Bytes to values and back, one folder or file a format: no I/O, no clock, no event loop."""
