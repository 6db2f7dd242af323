"""`blk daemon`: the live block layer as a program."""
