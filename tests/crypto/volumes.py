"""What the tests of encryption share: secrets, options for both tools, and images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import blocklayer
from oracles import Oracle

MIB = 1 << 20
SECRETS = {"one": b"first passphrase", "two": "zweite Passphrase, ä".encode(), "no": b"wrong"}
OBJECTS = [
    part
    for name, data in SECRETS.items()
    for part in ("--object", f"secret,id={name},data={data.decode().replace(',', ',,')}")
]
FAST = "1"
"""Milliseconds for a passphrase: as few iterations as there may be."""


def luks(path: Path, secret: str | None = "one", **more: Any) -> dict[str, Any]:
    """Options that open the LUKS volume ``path``."""
    key = {} if secret is None else {"key-secret": secret}
    return {"driver": "luks", "file": {"driver": "file", "filename": str(path)}, **key, **more}


def qcow2(path: Path, secret: str | None = "one", **more: Any) -> dict[str, Any]:
    """Options that open the encrypted qcow2 image ``path``."""
    key = {} if secret is None else {"encrypt": {"key-secret": secret}}
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, **key, **more}


def image_opts(options: Mapping[str, Any], prefix: str = "") -> str:
    """``options`` as the argument of ``--image-opts``."""
    parts = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            parts.append(image_opts(value, f"{prefix}{name}."))
        else:
            parts.append(f"{prefix}{name}={value}")
    return ",".join(parts)


def create(path: Path, size: int = 4 * MIB, **options: str) -> None:
    """Make a LUKS volume with blocklayer."""
    defaults = {"key-secret": "one", "iter-time": FAST}
    blocklayer.create(path, size, format="luks", secrets=SECRETS, **{**defaults, **options})


def create_qcow2(path: Path, size: int = 4 * MIB, secret: str = "one", **options: Any) -> None:
    """Make an encrypted qcow2 image with blocklayer."""
    encrypt = {"encrypt.format": "luks", "encrypt.key-secret": secret, "encrypt.iter-time": FAST}
    blocklayer.create(path, size, secrets=SECRETS, **{**encrypt, **options})


def open_disk(options: Mapping[str, Any], **more: Any) -> blocklayer.Disk:
    """Open for writing, unless told otherwise."""
    return blocklayer.open(options, secrets=SECRETS, **{"writable": True, **more})


def io(qemu_io: Oracle, options: Mapping[str, Any], *commands: str) -> str:
    """Run commands of the real qemu-io; the answer is what it printed."""
    wanted = [part for command in commands for part in ("-c", command)]
    shown = qemu_io(*OBJECTS, *wanted, "--image-opts", image_opts(options)).stdout
    assert "failed" not in shown, shown
    return shown
