"""The qcow2 format driver: where guest bytes live in an image, and how that changes safely."""
