"""`blk nbd`: an image served by NBD, as a program."""
