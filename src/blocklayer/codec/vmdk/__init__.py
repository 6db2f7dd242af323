"""VMDK: `descriptor` (what makes extents a disk), `sparse` (extents with grains), `stream`."""
