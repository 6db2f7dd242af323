"""The gate: whether a file that an image names may be opened, and what opening may cost.

1. What the user names is the user's business; what an *image* names (its backing file, its data
   file, its extents) goes through ``Policy.check`` first, and every file or device that is opened
   on its behalf, however nested, through ``Policy.check_storage`` (R8).
2. Limits apply to every chain, trusted or not, so that no image can make us recurse without end
   (R10).
3. A graph without a policy of its own has the process's: ``default_policy``.
"""

from __future__ import annotations

import os
import time

import msgspec

from blocklayer.errors import PolicyError

MAX_DEPTH = 500
"""Layers in one chain. Far above any real chain, far below what would exhaust memory."""
MAX_KEY_ITERATIONS = 1 << 30
"""For one key slot: some minutes, which no real image asks for."""

_STRICT_DEPTH = 32
_STRICT_MEMORY = 256 << 20
_STRICT_TIME_S = 30.0
_STRICT_KEY_ITERATIONS = 1 << 25
_LOCAL = ("file", "host_device")


class Policy(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """What images may open, and what opening them may cost; in JSON, names are kebab-case.

    ``references`` False refuses everything an image names. ``allow``, when given, lists files and
    folders that may be opened for an image; symbolic links are resolved, anything else is refused.
    ``protocols``, when given, lists the protocol drivers that may be opened for an image; with
    ``allow`` alone that is ``file``. Names that are no plain path need them listed. ``formats``,
    when given, lists the formats that any image may have, also one that the user names.
    ``probing`` False refuses to guess an image's format: it must be given, or stored in the image
    above.

    ``max_depth`` is in layers, ``max_size`` (of any disk, as a guest sees it) in bytes.
    ``max_memory`` is the metadata, in bytes, that opening a chain may read, and ``max_time_s`` the
    seconds it may take. ``max_key_iterations`` bounds the work that an encrypted image can ask for
    to try a passphrase.
    """

    references: bool = True
    allow: tuple[str, ...] | None = None
    protocols: tuple[str, ...] | None = None
    formats: tuple[str, ...] | None = None
    probing: bool = True
    max_depth: int = MAX_DEPTH
    max_key_iterations: int = MAX_KEY_ITERATIONS
    max_size: int | None = None
    max_memory: int | None = None
    max_time_s: float | None = None

    @classmethod
    def strict(cls, *allow: str) -> Policy:
        """For images from strangers: no guessing, limits, and no file but those in ``allow``."""
        return cls(
            references=bool(allow),
            allow=allow,
            probing=False,
            max_depth=_STRICT_DEPTH,
            max_memory=_STRICT_MEMORY,
            max_time_s=_STRICT_TIME_S,
            max_key_iterations=_STRICT_KEY_ITERATIONS,
        )

    def check(self, image: str, what: str, name: str, *, local: bool) -> None:
        """Raise PolicyError unless ``image`` may have its ``what`` ("backing file") ``name``
        opened; ``local``: the name is a plain path.
        """
        if not self.references:
            raise PolicyError(f"'{image}' names the {what} '{name}': the policy forbids opening it")
        if not local:
            if self.allow is not None and self.protocols is None:
                raise PolicyError(
                    f"'{image}' names the {what} '{name}': the policy allows plain local files only"
                )
            return
        if self.allow is not None and not self._allows(name):
            raise PolicyError(
                f"'{image}' names the {what} '{name}', which the policy does not allow"
            )

    def check_storage(self, image: str, protocol: str, filename: str | None) -> None:
        """Raise PolicyError unless a ``protocol`` node may be opened for ``image``, which named it;
        ``filename`` is the file's, None for protocols without.
        """
        allowed = self._protocols
        if allowed is not None and protocol not in allowed:
            raise PolicyError(
                f"'{image}' wants storage of the kind '{protocol}', which the policy does not allow"
            )
        if self.allow is not None and protocol in _LOCAL and not self._allows(filename or ""):
            raise PolicyError(
                f"'{image}' names the file '{filename}', which the policy does not allow"
            )

    def check_node(self, image: str, name: str) -> None:
        """Raise PolicyError unless ``image`` may use the open node ``name``, which it names."""
        if self._protocols is not None:
            raise PolicyError(f"'{image}' names the node '{name}', which the policy does not allow")

    @property
    def _protocols(self) -> tuple[str, ...] | None:
        return ("file",) if self.protocols is None and self.allow is not None else self.protocols

    def _allows(self, name: str) -> bool:
        try:
            real = os.path.realpath(name)
            folders = [os.path.realpath(allowed) for allowed in self.allow or ()]
        except ValueError:
            # A name with a zero byte in it is no file's.
            return False
        return any(real == at or real.startswith(at.rstrip("/") + "/") for at in folders)

    def check_format(self, format: str) -> None:
        """Raise PolicyError unless images may have this format."""
        if self.formats is not None and format not in self.formats:
            raise PolicyError(f"The policy does not allow images of the format '{format}'")

    def check_size(self, image: str, size: int) -> None:
        """Raise PolicyError when the disk is larger than the limit."""
        if self.max_size is not None and size > self.max_size:
            raise PolicyError(
                f"The disk in '{image}' has {size} bytes, the policy allows {self.max_size}"
            )

    def check_depth(self, image: str, depth: int) -> None:
        """Raise PolicyError when the chain has grown deeper than the limit."""
        if depth > self.max_depth:
            raise PolicyError(
                f"The backing chain of '{image}' has more than {self.max_depth} layers"
            )

    def budget(self) -> Budget | None:
        """What opening one chain may spend from now on, None without limits."""
        if self.max_memory is None and self.max_time_s is None:
            return None
        return Budget(self)


class Budget:
    """What may still be spent on opening a chain. Reading metadata is what costs both."""

    def __init__(self, policy: Policy) -> None:
        self.users = 0
        """Images that are being opened at its expense."""
        self._policy = policy
        self._left = policy.max_memory
        limit_s = policy.max_time_s
        self._deadline_s = None if limit_s is None else time.monotonic() + limit_s

    def spend(self, length: int) -> None:
        """``length`` more bytes are to be read. Raises PolicyError once a limit is passed."""
        if self._left is not None:
            self._left -= length
            if self._left < 0:
                raise PolicyError(
                    "Opening the image takes more metadata than the policy allows "
                    f"({self._policy.max_memory} bytes)"
                )
        if self._deadline_s is not None and time.monotonic() > self._deadline_s:
            raise PolicyError(
                "Opening the image takes longer than the policy allows "
                f"({self._policy.max_time_s} seconds)"
            )


_default = [Policy()]


def default_policy() -> Policy:
    """The policy of every graph that was not given another."""
    return _default[0]


def set_default_policy(policy: Policy) -> None:
    """Let ``policy`` be in force in this process wherever no other is given."""
    _default[0] = policy
