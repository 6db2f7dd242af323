"""QMP: the daemon's JSON protocol. Decode, call, encode; what is asked for is done below."""
