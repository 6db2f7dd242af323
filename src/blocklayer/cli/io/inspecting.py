"""Commands about the image as a whole: info, length, map, alloc, truncate, flush."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from blocklayer.cli import console
from blocklayer.cli.img.info import tree
from blocklayer.cli.io.session import Session
from blocklayer.cli.io.texts import number, size_text
from blocklayer.cli.io.verbs import CommandError, Given, Verb
from blocklayer.errors import BlockError, UsageError
from blocklayer.graph.driver import DriverInfo
from blocklayer.graph.extent import Kind
from blocklayer.graph.filter import FilterDriver
from blocklayer.graph.node import Node
from blocklayer.units import SECTOR

_PREALLOCATION = ("off", "metadata", "falloc", "full")


async def _allocated(node: Node, offset: int, end: int) -> AsyncIterator[tuple[int, int, bool]]:
    """Runs (start, end, whether this layer has something there), neighbours of a kind as one."""
    while isinstance(node.driver, FilterDriver):
        node = node.children["file"].node
    start, have = offset, None
    while offset < end:
        extent = await node.driver.map(offset, end - offset)
        found = extent.kind is not Kind.UNALLOCATED
        if have is not None and found is not have:
            yield start, offset, have
            start = offset
        have = found
        offset = min(end, offset + extent.length)
    if have is not None:
        yield start, end, have


async def _map(session: Session, given: Given) -> None:
    node = session.node
    try:
        async for start, end, have in _allocated(node, 0, node.size):
            console.say(
                f"{size_text(end - start)} ({end - start:#x}) bytes "
                f"{'    allocated' if have else 'not allocated'} "
                f"at offset {size_text(start)} ({start:#x})"
            )
    except BlockError as error:
        console.error(str(error))
        raise CommandError("Failed to query allocation status") from None


async def _alloc(session: Session, given: Given) -> None:
    node, start = session.node, number(given.operands[0])
    asked = number(given.operands[1]) if len(given.operands) > 1 else SECTOR
    end = max(start, min(start + asked, node.size))
    total = 0
    async for low, high, have in _allocated(node, start, end):
        total += (high - low) * have
    console.say(f"{total}/{end - start} bytes allocated at offset {size_text(start)}")


async def _info(session: Session, given: Given) -> None:
    driver = session.node.driver
    general = driver.info() or DriverInfo()
    console.say(f"format name: {driver.NAME}")
    console.say(f"cluster size: {size_text(general.cluster_size)}")
    console.say(f"vm state offset: {size_text(general.vm_state_offset)}")
    specific = driver.specific_info()
    lines = tree(msgspec.to_builtins(specific), 1) if specific is not None else []
    if lines:
        console.say("Format specific information:")
        console.say("\n".join(lines))


async def _length(session: Session, given: Given) -> None:
    console.say(size_text(session.node.size))


async def _truncate(session: Session, given: Given) -> None:
    mode = given.value("m") or "off"
    if mode not in _PREALLOCATION:
        raise UsageError(f"Invalid preallocation mode '{mode}'")
    size = number(given.operands[0])
    await session.root.truncate(size, preallocation=mode, shrink=True)


async def _flush(session: Session, given: Given) -> None:
    await session.root.flush()


VERBS = (
    Verb(
        name="alloc",
        alias="a",
        run=_alloc,
        usage="offset [count]",
        least=1,
        most=2,
        summary="count the bytes allocated from an offset on",
    ),
    Verb(
        name="flush",
        alias="f",
        run=_flush,
        summary="bring all that was written to stable storage",
    ),
    Verb(name="info", alias="i", run=_info, summary="say what the image is"),
    Verb(name="length", alias="l", run=_length, summary="say how large the disk is"),
    Verb(name="map", run=_map, summary="list what is allocated and what is not"),
    Verb(
        name="truncate",
        alias="t",
        run=_truncate,
        usage="[-m prealloc_mode] off",
        flags={"m": "preallocation of what is added: off, metadata, falloc or full"},
        least=1,
        most=3,
        operands=(1, 1),
        changes=True,
        summary="make the disk larger or smaller",
    ),
)
