"""Power failures of images with several features at once: encryption above all, whose unwritten
space must never be shown, beside extended L2 entries, data files, snapshots and bitmaps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blocklayer.graph import bitmaps
from proof.chains import run
from proof.crashes import KEY, driver_of, moments, new_image, spread, survive, take
from proof.pairs import new_pair
from proof.test_power_failure import KIB, WORKLOADS, record

LUKS = {
    "encrypt.format": "luks",
    "encrypt.key-secret": "one",
    "encrypt.iter-time": 1,
    "encrypt.cipher-alg": "aes-128",
}
EXTENDED = {"cluster_size": 16 * KIB, "extended_l2": True}
SIZE = 80 * KIB
MOST = 40
"""States tried for one workload: each is opened several times, and opening derives a key."""

FITTING = ["zeros", "discard_and_reuse", "resizing"]


@pytest.mark.parametrize("shape", [{}, EXTENDED], ids=["plain", "extended L2"])
@pytest.mark.parametrize("workload", FITTING)
def test_encrypted(workload: str, shape: dict[str, Any]) -> None:
    async def main() -> None:
        disk = await new_image(SIZE, **LUKS, **shape)
        bench = await record(WORKLOADS[workload], disk, **KEY)
        assert await survive(bench, spread(moments(disk), MOST)) > 20

    run(main())


@pytest.mark.parametrize("shape", [{}, EXTENDED], ids=["plain", "extended L2"])
@pytest.mark.parametrize("workload", FITTING)
def test_encrypted_data_file(tmpfs: Path, workload: str, shape: dict[str, Any]) -> None:
    async def main() -> None:
        pair: Any = await new_pair(tmpfs, SIZE, **LUKS, **shape)
        bench = await record(WORKLOADS[workload], pair, **KEY)
        assert await survive(bench, spread(moments(pair), MOST)) > 20

    run(main())


@pytest.mark.parametrize(
    ("made", "opening"),
    [(LUKS, KEY), ({**LUKS, **EXTENDED}, KEY), (EXTENDED, {})],
    ids=["encrypted", "encrypted, extended L2", "extended L2"],
)
@pytest.mark.parametrize("workload", ["plain_writes", "zeros", "discard_and_reuse"])
def test_with_a_snapshot_and_a_bitmap(
    workload: str, made: dict[str, Any], opening: dict[str, Any]
) -> None:
    """Clusters are shared, and the bitmap is stored when the image is closed."""

    async def main() -> None:
        disk = await new_image(SIZE, **made)
        root = await take(disk, **opening)
        await root.write(0, b"\x09" * 60 * KIB)
        await driver_of(root).snapshot_create("before")
        bitmaps.add(root.node, "all", granularity=512, persistent=True)
        await root.close()
        disk.settle()
        bench = await record(WORKLOADS[workload], disk, **opening)
        assert await survive(bench, spread(moments(disk), MOST)) > 20

    run(main())
