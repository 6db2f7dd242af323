"""`blk io`: reading and writing inside an image, command by command, used like qemu-io."""
