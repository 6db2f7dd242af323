"""The `nbd` driver: an export of any NBD server as a node."""
