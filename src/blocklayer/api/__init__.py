"""The library's front door: disks for synchronous and for asynchronous callers, and typed
results.
"""
