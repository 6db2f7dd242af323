"""VMDK: `driver` (the disk), `extents` (its parts), `compressed` (grains of streams), `create`."""
