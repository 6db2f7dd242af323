"""`blk shell`: a prompt for QMP."""
