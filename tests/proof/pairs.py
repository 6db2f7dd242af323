"""An image with a data file on two crashing disks, which lose power at one moment.

A `Pair` stands in for the one disk of `crashes`: its log is the two logs, merged in the order in
which the requests began. After a power failure each disk holds any of its own states.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from blocklayer.drivers.memory import Pages
from blocklayer.graph.create import create_image
from blocklayer.testing.crashing import CrashingDisk, Event, State
from proof.crashes import new_graph, raw_disk

APART = 1 << 40
"""Where the data file's pages are put, to tell states of pairs from one another."""


class _Log(list[Event]):
    """A disk's log that also notes in `order` whose request began."""

    def __init__(self, order: list[_Log]) -> None:
        super().__init__()
        self._order = order

    def append(self, event: Event) -> None:
        self._order.append(self)
        super().append(event)


class Pair:
    """An image's disk and its data file's."""

    def __init__(self, image: CrashingDisk, data: CrashingDisk) -> None:
        self.image = image
        self.data = data
        self.settle()

    @property
    def name(self) -> str:
        return self.image.name

    @property
    def options(self) -> dict[str, Any]:
        """What opening the image takes."""
        return {"data-file": {"driver": "crashing", "filename": self.data.name}}

    @property
    def position(self) -> int:
        return len(self._order)

    def settle(self) -> None:
        """Take the contents as durable, and begin empty logs."""
        self._order: list[_Log] = []
        for disk in (self.image, self.data):
            disk.settle()
            disk.log = _Log(self._order)

    def states(self, position: int) -> Iterator[PairState]:
        """Each state of one disk with one of the other's: the plainest, and the most different."""
        of_image = self._order[:position].count(self.image.log)  # type: ignore[arg-type]
        images = list(self.image.states(of_image))
        datas = list(self.data.states(position - of_image))
        for one in images:
            for other in islice(datas, 2):
                yield PairState(one, other, position)
        for one in images[:2]:
            for other in datas[2:]:
                yield PairState(one, other, position)


class PairState:
    """What both disks may hold."""

    def __init__(self, image: State, data: State, position: int) -> None:
        self.image = image
        self.data = data
        self.position = position
        self.pages = Pages()
        self.pages.pages = {
            **image.pages.pages,
            **{APART + index: page for index, page in data.pages.pages.items()},
        }

    def disk(self) -> Pair:
        return Pair(self.image.disk(), self.data.disk())

    def __str__(self) -> str:
        return f"image {self.image}; data file {self.data}"


async def new_pair(
    folder: Path, size: int, *, raw: bool = False, base: CrashingDisk | None = None, **options: Any
) -> Pair:
    """A new image with a data file on two new disks, on stable storage."""
    values = {
        "cluster_size": 512,
        "data_file": str(folder / "data"),
        "data_file_raw": raw,
        **options,
    }
    await create_image(
        new_graph(),
        str(folder / "image"),
        "qcow2",
        values,
        size=size,
        backing=None if base is None else base.name,
        backing_format=None if base is None else "raw",
        check_backing=False,
    )
    return Pair(raw_disk((folder / "image").read_bytes()), raw_disk((folder / "data").read_bytes()))
