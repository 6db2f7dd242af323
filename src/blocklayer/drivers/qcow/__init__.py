"""qcow, version 1: `driver`, and `clusters` that are compressed or encrypted."""
