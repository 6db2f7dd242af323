"""The NBD server: ``server`` has the door, ``connection`` one client, ``commands`` what it asks."""
