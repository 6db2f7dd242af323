"""From passphrases to keys: PBKDF2, and how many iterations take a given time.

1. Deriving runs without the interpreter's lock: call it through ``graph.waiting.offload``.
"""

from __future__ import annotations

import hashlib
import time
from typing import Final

from blocklayer.codec.luks import check_hash

MIN_ITERATIONS: Final = 1000
DEFAULT_TIME_MS: Final = 2000
_MEASURE_S: Final = 0.02
_MEASURE_FIRST: Final = 1 << 12


def derive(
    hash_name: str, secret: bytes | bytearray, salt: bytes, iterations: int, size: int
) -> bytearray:
    """The key of ``size`` bytes that ``secret`` stands for. Raises UnsupportedError."""
    check_hash(hash_name)
    return bytearray(hashlib.pbkdf2_hmac(hash_name, secret, salt, iterations, size))


def iterations_for(hash_name: str, size: int, time_ms: int, most: int) -> int:
    """How many iterations take ``time_ms`` of this processor for a key of ``size`` bytes."""
    count, least_s = _MEASURE_FIRST, min(_MEASURE_S, time_ms / 1000)
    while True:
        before = time.thread_time()
        derive(hash_name, b"passphrase", bytes(32), count, size)
        took_s = time.thread_time() - before
        if took_s and took_s >= least_s:
            break
        count *= 4
    return min(max(int(count * time_ms / 1000 / took_s), MIN_ITERATIONS), most)
