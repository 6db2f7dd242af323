"""Images with a data file: power failures of both files at once, and the Nth failure of either.

An image that calls its data file raw is compared with it in every state, byte for byte.
"""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from blocklayer.errors import BlockError
from blocklayer.testing.contract import read_all
from blocklayer.testing.crashing import CrashingDisk
from blocklayer.testing.model import Chain, Versions, difference
from blocklayer.testing.strategies import Request
from proof.chains import run
from proof.crashes import check, driver_of, judge_raw, moments, raw_disk, spread, survive, take
from proof.pairs import Pair, new_pair
from proof.test_nth_failure import OPERATIONS, SIZE, TRIES_MAX, outcome, retry
from proof.test_power_failure import KIB, WORKLOADS, record

FITTING = [name for name in WORKLOADS if name != "compressed"]
MOST = 120


def units(kind: str) -> dict[str, int | bool]:
    """The smallest clusters that images of the kind can have."""
    extended = "extended" in kind
    return {"cluster_size": 16 * KIB if extended else 512, "extended_l2": extended}


@pytest.mark.parametrize(
    "kind", ["plain", "raw", "backed", "lazy", "extended", "raw extended", "backed extended"]
)
@pytest.mark.parametrize("workload", FITTING)
def test_every_moment(tmpfs: Path, workload: str, kind: str) -> None:
    async def main() -> None:
        content = Request("write", 0, 50 * KIB + 512, 0xBB).data
        base = raw_disk(content) if "backed" in kind else None
        pair = await new_pair(
            tmpfs,
            80 * KIB,
            raw="raw" in kind,
            base=base,
            lazy_refcounts=kind == "lazy",
            **units(kind),
        )
        bench = await record(WORKLOADS[workload], pair)  # type: ignore[arg-type]
        states = moments(pair)  # type: ignore[arg-type]
        assert await survive(bench, spread(states, MOST)) > 20

    run(main())


async def prepared(folder: Path, kind: str) -> tuple[Pair, CrashingDisk | None]:
    """An image with data and zeros, and its base."""
    base = raw_disk(Request("write", 0, 25 * KIB, 0xBB).data) if "backed" in kind else None
    pair = await new_pair(folder, SIZE, raw="raw" in kind, base=base, **units(kind))
    root = await take(pair)  # type: ignore[arg-type]
    await root.write(0, b"\x11" * 5120)
    await root.write_zeroes(15 * KIB, 2 * KIB)
    await root.close()
    pair.settle()
    return pair, base


async def fail_once(start: Pair, name: str, nth: int, error: int, *, in_data: bool) -> bool:
    """Run the operation with the `nth` request of one file failing; whether none failed."""
    operation, effect = OPERATIONS[name]
    pair = Pair(start.image.snapshot(), start.data.snapshot())
    disk = pair.data if in_data else pair.image
    root = await take(pair)  # type: ignore[arg-type]
    old = await read_all(root)
    model = Chain(len(old))
    model.write(0, old)
    effect(model, driver_of(root).allocation_unit)
    new = model.visible()
    versions = Versions(old)
    versions.begin(new)
    disk.fail(nth, error)
    raised = await outcome(operation(root))
    failed = disk.failures
    disk.fail(0)
    story = f"{name}, request {nth} fails"
    if not failed:
        assert raised is None, story
        content = await read_all(root)
        assert content == new, difference(content, new)
        await judge_raw(root, content)
        await root.close()
        return True
    assert raised is not None, f"{story}, and nobody was told"
    content = await read_all(root)
    problem = versions.explain(content, unit=1)
    assert problem is None, f"{story}: {problem}"
    await retry(root, operation, new, story)
    try:
        await root.close()
    except BlockError:
        assert root.graph.nodes == {}, story
    root = await take(Pair(pair.image.snapshot(), pair.data.snapshot()))  # type: ignore[arg-type]
    content = await read_all(root)
    problem = versions.explain(content, unit=1)
    assert problem is None, f"{story}: opened again: {problem}"
    await judge_raw(root, content)
    found = await check(root)
    assert not found.corruptions, f"{story}: opened again: {found.messages}"
    await root.close()
    return False


@pytest.mark.parametrize("in_data", [False, True], ids=["image", "data file"])
@pytest.mark.parametrize("kind", ["plain", "raw", "backed", "raw extended", "backed extended"])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if "compress" not in name])
def test_the_nth_failure(tmpfs: Path, name: str, kind: str, in_data: bool) -> None:
    async def main() -> None:
        start, base = await prepared(tmpfs, kind)
        for nth in range(1, TRIES_MAX):
            error = errno.EIO if nth % 2 else errno.ENOSPC
            if await fail_once(start, name, nth, error, in_data=in_data):
                break
        else:
            pytest.fail("it never got through")
        assert base is None or base.position == 0, "the backing file was written to"

    run(main())
