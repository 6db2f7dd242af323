"""The NBD protocol, both sides, without I/O: fixed newstyle handshake and transmission.

``constants`` has the numbers, ``records`` the structures, ``server`` and ``client`` the handshakes,
``messages`` requests and replies of the transmission phase.
"""
