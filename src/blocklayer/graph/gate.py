"""The gate: whether a file that an image names may be opened. Asked at one place, ``graph.open``.

1. What the user names is the user's business; what an *image* names (its backing file, its data
   file) goes through ``Policy.check`` first (R8).
2. Limits apply to every chain, trusted or not, so that no image can make us recurse without end
   (R10).
"""

from __future__ import annotations

import os

import msgspec

from blocklayer.errors import PolicyError

MAX_DEPTH = 500
"""Layers in one chain. Far above any real chain, far below what would exhaust memory."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What images may open, and how deep.

    ``references`` False refuses everything an image names. ``allow``, when given, lists files and
    folders (absolute, symbolic links resolved) that may be opened; anything else is refused, as is
    every name that is not a plain local file. ``probe`` False refuses to guess an image's format.
    """

    references: bool = True
    allow: tuple[str, ...] | None = None
    max_depth: int = MAX_DEPTH
    probe: bool = True

    def check(self, image: str, what: str, name: str, *, local: bool) -> None:
        """Raise PolicyError unless ``image`` may have its ``what`` ("backing file") ``name``
        opened.
        """
        if not self.references:
            raise PolicyError(f"'{image}' names the {what} '{name}': the policy forbids opening it")
        if self.allow is None:
            return
        if not local:
            raise PolicyError(
                f"'{image}' names the {what} '{name}': the policy allows plain local files only"
            )
        real = os.path.realpath(name)
        for allowed in self.allow:
            if real == allowed or real.startswith(allowed.rstrip("/") + "/"):
                return
        raise PolicyError(f"'{image}' names the {what} '{name}', which the policy does not allow")

    def check_depth(self, image: str, depth: int) -> None:
        """Raise PolicyError when the chain has grown deeper than the limit."""
        if depth > self.max_depth:
            raise PolicyError(
                f"The backing chain of '{image}' has more than {self.max_depth} layers"
            )
