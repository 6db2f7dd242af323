"""VHDX: `driver`, its `log` of metadata changes, and `create`."""
