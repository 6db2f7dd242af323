"""A state machine against the model: whatever is done to a chain, in any order, bytes are bytes.

Clusters are tiny and caches as small as they can be, so that tables grow, caches evict and L2
tables are shared out in images of a few kilobytes. When a run ends, every layer must be clean: no
corruption and no leak, by our check and, where it is installed, by the real one.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from blocklayer.api.disk import Disk, create
from blocklayer.testing.contract import apply, read_all
from blocklayer.testing.model import Chain, Layer
from blocklayer.testing.strategies import Request, Shape, requests, shapes, sizes
from oracles import Oracle, find
from proof.chains import blk, blk_json, our_read

T = TypeVar("T")

MEMORY = Path("/dev/shm")
CACHES = ({}, {"l2-cache-size": 1024, "l2-cache-entry-size": 512, "refcount-cache-size": 2048})


class ChainMachine(RuleBasedStateMachine):
    """A chain of qcow2 files, its top open for writing, beside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(
            tempfile.mkdtemp(prefix="model-", dir=MEMORY if MEMORY.is_dir() else None)
        )
        self.layers: list[tuple[str, Shape]] = []
        self.model = Chain()
        self.disk: Disk | None = None
        self.made = 0

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(coroutine)

    @initialize(
        base=shapes(large=False),
        others=st.lists(shapes(large=False), max_size=3),
        cache=st.sampled_from(CACHES),
    )
    def start(self, base: Shape, others: list[Shape], cache: dict[str, int]) -> None:
        self.cache = cache
        for shape in (base, *others):
            self.push(shape)
        self.open()

    def push(self, shape: Shape) -> None:
        """Put a new layer on top."""
        self.made += 1
        name = f"{self.made}.qcow2"
        below = self.layers[-1][0] if self.layers else None
        backing = {"backing": below, "backing_format": "qcow2"} if below else {}
        options = {**shape.options(), **self.more_options()}
        self.run(create(self.folder / name, shape.size, **backing, **options))
        self.layers.append((name, shape))
        self.model.layers.append(Layer(shape.size))

    def more_options(self) -> dict[str, Any]:
        """What a new layer has besides its shape."""
        return {}

    def open(self) -> None:
        file = {"driver": "file", "filename": str(self.folder / self.layers[-1][0])}
        options = {"driver": "qcow2", "file": file, **self.cache}
        self.disk = self.run(Disk.open(options, writable=True))
        self.look()

    def close(self) -> None:
        assert self.disk is not None
        disk, self.disk = self.disk, None
        self.run(disk.close())

    def look(self) -> None:
        assert self.disk is not None
        self.model.settle(self.run(read_all(self.disk.root)))

    @property
    def shape(self) -> Shape:
        """The top's, with the size it has now."""
        _, shape = self.layers[-1]
        return Shape(size=self.model.size, cluster_size=shape.cluster_size)

    @rule(data=st.data())
    def request(self, data: st.DataObject) -> None:
        below = [layer.size for layer in self.model.layers[:-1]]
        self.send(data.draw(requests(self.shape, below).filter(self.fits)))

    def fits(self, request: Request) -> bool:
        """Whether the top can take the request."""
        return True

    def send(self, request: Request) -> None:
        assert self.disk is not None
        self.run(apply(self.disk.root, request))
        request.apply(self.model)
        self.look()

    @rule()
    def fill(self) -> None:
        """Every cluster becomes allocated: tables grow."""
        self.send(Request("write", 0, self.model.size, 0x5A))

    @rule(kind=st.sampled_from(("zero", "unmap", "discard")))
    def clear(self, kind: str) -> None:
        """Every cluster becomes free, or stays reserved."""
        self.send(Request(kind, 0, self.model.size))

    @rule()
    def flush(self) -> None:
        assert self.disk is not None
        self.run(self.disk.flush())

    @rule()
    def reopen(self) -> None:
        self.close()
        self.open()

    @rule(data=st.data())
    def resize(self, data: st.DataObject) -> None:
        assert self.disk is not None
        size = data.draw(sizes(self.shape.cluster_size))
        self.run(self.disk.resize(size, shrink=True))
        self.model.resize(size)
        self.look()

    @precondition(lambda self: len(self.layers) < 6)
    @rule(shape=shapes(large=False))
    def snapshot(self, shape: Shape) -> None:
        """A new layer takes the writes."""
        self.close()
        self.push(shape)
        self.open()

    @precondition(lambda self: len(self.layers) > 1)
    @rule()
    def commit(self) -> None:
        """The top's bytes move down, and the top stays, empty."""
        self.close()
        blk("img", "commit", "-q", "-f", "qcow2", self.folder / self.layers[-1][0])
        self.model.commit()
        self.open()

    @precondition(lambda self: len(self.layers) > 1)
    @rule(to_nothing=st.booleans())
    def rebase(self, to_nothing: bool) -> None:
        """The layer below the top is left out, or all of them are."""
        self.close()
        kept = [] if to_nothing else self.layers[:-2]
        target = ["-b", kept[-1][0], "-F", "qcow2"] if kept else ["-b", ""]
        blk("img", "rebase", "-q", "-f", "qcow2", *target, self.folder / self.layers[-1][0])
        self.layers = [*kept, self.layers[-1]]
        seen = self.model.visible()
        self.model.layers = [*self.model.layers[: len(kept)], self.model.layers[-1]]
        self.model.write(0, seen)
        self.open()

    def teardown(self) -> None:
        try:
            if self.disk is not None:
                self.close()
                self.check()
        finally:
            self.loop.close()
            shutil.rmtree(self.folder)

    def check(self) -> None:
        oracle = find("qemu-img")
        for name, _ in self.layers:
            image = self.folder / name
            ours = blk_json("check", "-f", "qcow2", "--output=json", image)
            assert not {"corruptions", "leaks", "check-errors"} & {k for k, v in ours.items() if v}
            if isinstance(oracle, Oracle):
                oracle("check", "-q", "-f", "qcow2", image)


class DataFileMachine(ChainMachine):
    """The same with a data file for every layer; the base's is a raw image of the whole disk."""

    def more_options(self) -> dict[str, Any]:
        name = str(self.folder / f"{self.made}.data")
        return {"compat": "1.1", "data_file": name, "data_file_raw": not self.layers}

    def fits(self, request: Request) -> bool:
        return request.kind != "compress"

    def check(self) -> None:
        super().check()
        base, _ = self.layers[0]
        if base == "1.qcow2":
            seen = self.run(our_read(self.folder / base))
            assert (self.folder / "1.data").read_bytes() == seen


TestChain = ChainMachine.TestCase
TestChainOfDataFiles = DataFileMachine.TestCase
_SETTINGS = settings(
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestChain.settings = TestChainOfDataFiles.settings = _SETTINGS
