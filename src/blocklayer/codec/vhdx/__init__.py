"""VHDX: `structure` (headers, regions, metadata, block words) and `log` (its entries)."""
