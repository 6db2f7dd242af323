"""Parallels' expanding images: `driver`, `clusters` that are free, and `check` with repair."""
