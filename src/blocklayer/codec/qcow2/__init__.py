"""The qcow2 format as values: header, geometry, table entries, refcounts, snapshots, bitmaps."""
