"""Encrypted guest data: sector ciphers, LUKS key slots, and the ``luks`` driver."""
