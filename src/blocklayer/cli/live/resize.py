"""`blk live blockresize`: a disk in use made larger."""

from __future__ import annotations

import msgspec

from blocklayer.cli.live.verb import DISK, Verb, find_disk
from blocklayer.qmp.client import Client
from blocklayer.units import format_size, parse_size


class Resized(msgspec.Struct, frozen=True):
    """What ``blockresize`` did."""

    disk: str
    size: int


class BlockResize(Verb):
    """Change the size of a disk while it is used

    A plain number is in KiB; B, k, M, G and T say other units.
    """

    OPERANDS = (DISK, ("SIZE", "the new size"))
    EXAMPLE = ("disk0 40G", "disk0 has 40 GiB from now on")

    async def act(self, client: Client, operands: list[str]) -> int:
        disk = await find_disk(client, operands[0])
        size = parse_size(operands[1], default_suffix="K")
        await client.execute("block_resize", {"node-name": disk.active.node, "size": size})
        self.tell(
            Resized(disk.name, size),
            f"Block device '{disk.name}' is resized to {format_size(size)}",
        )
        return 0
