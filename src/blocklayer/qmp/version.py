"""Which QEMU's behaviour is followed, and who we are: the version that clients are told."""

from __future__ import annotations

from typing import Any, Final

import blocklayer

QEMU_VERSION: Final = (10, 0, 2)
"""Major, minor, micro of the release whose commands, texts and defaults are followed."""


def version_info() -> dict[str, Any]:
    """VersionInfo, as the greeting and ``query-version`` have it."""
    major, minor, micro = QEMU_VERSION
    return {
        "qemu": {"micro": micro, "minor": minor, "major": major},
        "package": package(),
    }


def package() -> str:
    """The name and version of this program."""
    return f"blocklayer {blocklayer.__version__}"
