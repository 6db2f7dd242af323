"""``blk tour``: plays the talk on real disks and checks every step."""
