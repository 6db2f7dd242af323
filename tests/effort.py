"""How much a property test tries: few examples in `make test`, many in `make soak`."""

from __future__ import annotations

from hypothesis import settings

ORDINARY = 30
"""Examples where a test says nothing else; the profiles are in `conftest`."""


def examples(ordinary: int) -> int:
    """So many in `make test`, and as many times more as the profile in use has more."""
    return max(1, ordinary * settings.default.max_examples // ORDINARY)
