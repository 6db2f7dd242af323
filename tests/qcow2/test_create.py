"""A new qcow2 image is the one qemu-img makes, and one that is preallocated is as good.

1. Without preallocation whole files are compared, byte by byte.
2. What QEMU refuses is refused, in the same words.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blocklayer.codec.qcow2.geometry import Geometry
from blocklayer.codec.qcow2.header import decode_header
from blocklayer.drivers import REGISTRY
from blocklayer.drivers.qcow2.create import Qcow2CreateOptions, create
from blocklayer.drivers.qcow2.layout import plan
from blocklayer.errors import StorageError, UsageError
from blocklayer.graph import io
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_options
from blocklayer.graph.options import decode
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from effort import examples
from oracles import Oracle

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


def make(path: Path, **options: Any) -> None:
    """Create an image at `path`, which is emptied."""

    async def run() -> None:
        path.write_bytes(b"")
        graph = Graph(REGISTRY)
        node = await open_options(
            graph, {"driver": "file", "filename": str(path)}, Flags(read_only=False)
        )
        root = Root(node, "a test", Permission.WRITE | Permission.RESIZE)
        try:
            await create(graph, node, decode(Qcow2CreateOptions, options))
        finally:
            await root.close()

    asyncio.run(run())


def option_list(options: dict[str, Any]) -> str:
    """The options as -o takes them."""
    words = {"True": "on", "False": "off"}
    return ",".join(f"{name}={words.get(str(value), value)}" for name, value in options.items())


def make_theirs(qemu_img: Oracle, path: Path, size: int, **options: Any) -> None:
    arguments = ["-o", option_list(options)] if options else []
    qemu_img("create", "-q", "-u", "-f", "qcow2", *arguments, path, str(size))


@st.composite
def image_options(draw: st.DrawFn) -> dict[str, Any]:
    cluster_bits = draw(st.integers(9, 21))
    options: dict[str, Any] = {"cluster_size": 1 << cluster_bits}
    version = draw(st.sampled_from(["0.10", "1.1", "v2", "v3"]))
    options["compat"] = version
    if version in ("1.1", "v3"):
        options["refcount_bits"] = 1 << draw(st.integers(0, 6))
        options["lazy_refcounts"] = draw(st.booleans())
        options["compression_type"] = draw(st.sampled_from(["zlib", "zstd"]))
    if draw(st.booleans()):
        options["backing_file"] = draw(st.text("abcé/.", min_size=1, max_size=60))
        options["backing_fmt"] = draw(st.sampled_from(["raw", "qcow2"]))
    # An L1 table of up to 1 MiB: refcount blocks beyond the first, and a table of one cluster.
    largest = min(1 << (cluster_bits * 2 - 3 + 17), 1 << 50)
    options["size"] = draw(
        st.one_of(st.integers(0, 4 * MIB), st.integers(0, largest), st.just(largest))
    )
    return options


@given(options=image_options())
@settings(max_examples=examples(30), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_theirs_byte_for_byte(
    tmpfs: Path, qemu_img: Oracle, options: dict[str, Any]
) -> None:
    ours, theirs = tmpfs / "ours.qcow2", tmpfs / "theirs.qcow2"
    make(ours, **options)
    make_theirs(qemu_img, theirs, **options)
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 65536, MIB + 1, 40 * GIB])
def test_equals_theirs_at_the_edges(
    tmpfs: Path, qemu_img: Oracle, cluster_size: int, size: int
) -> None:
    if cluster_size == 512:
        # What an L1 table of 512-byte clusters takes grows fast: stay with one refcount table.
        size = min(size, 16 * GIB)
    ours, theirs = tmpfs / "ours.qcow2", tmpfs / "theirs.qcow2"
    make(ours, size=size, cluster_size=cluster_size)
    make_theirs(qemu_img, theirs, size, cluster_size=cluster_size)
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("refcount_bits", [16, 64])
def test_refcount_table_of_many_clusters(tmpfs: Path, qemu_img: Oracle, refcount_bits: int) -> None:
    path = tmpfs / "a.qcow2"
    make(path, size=128 * GIB, cluster_size=512, refcount_bits=refcount_bits)
    assert decode_header(path.read_bytes()[:512]).refcount_table_clusters > 1
    assert qemu_img.json("check", "--output=json", path).get("leaks", 0) == 0


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize(
    ("cluster_size", "size", "refcount_bits"),
    [
        (512, 3 * MIB + 512, 16),
        (512, 300 * KIB, 64),
        (4096, 9 * MIB + 1000, 1),
        (65536, 24 * MIB, 16),
        (65536, 0, 16),
        (2 * MIB, 5 * MIB, 8),
    ],
)
def test_preallocated(
    tmpfs: Path,
    qemu_img: Oracle,
    preallocation: str,
    cluster_size: int,
    size: int,
    refcount_bits: int,
) -> None:
    path = tmpfs / "a.qcow2"
    options = {"cluster_size": cluster_size, "refcount_bits": refcount_bits}
    make(path, size=size, preallocation=preallocation, **options)
    report = qemu_img.json("check", "--output=json", path)
    rounded = -(-size // 512) * 512
    assert report.get("allocated-clusters", 0) == -(-rounded // cluster_size)
    assert report.get("fragmented-clusters", 0) == 0
    assert report["image-end-offset"] == path.stat().st_size
    if preallocation != "metadata":
        assert path.stat().st_blocks * 512 >= path.stat().st_size
    if size:
        empty = tmpfs / "empty.raw"
        empty.write_bytes(b"")
        os.truncate(empty, rounded)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", path, empty)
        assert all(run["data"] for run in qemu_img.json("map", "--output=json", path)) or (
            preallocation == "metadata"
        )


def test_metadata_of_a_large_disk_needs_little(tmpfs: Path, qemu_img: Oracle) -> None:
    path = tmpfs / "a.qcow2"
    make(path, size=40 * GIB, preallocation="metadata")
    assert path.stat().st_blocks * 512 < 8 * MIB
    assert qemu_img.json("check", "--output=json", path)["allocated-clusters"] == 40 * GIB // 65536


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compat": "v2"},
        {"lazy_refcounts": True, "refcount_bits": 1, "cluster_size": 4096},
        {"backing_file": "base.raw", "backing_fmt": "raw"},
        {"compression_type": "zstd"},
    ],
)
def test_info_is_the_same(tmpfs: Path, qemu_img: Oracle, options: dict[str, Any]) -> None:
    (tmpfs / "base.raw").write_bytes(bytes(MIB))
    infos = []
    for folder, maker in (("a", make), ("b", lambda p, **o: make_theirs(qemu_img, p, **o))):
        (tmpfs / folder).mkdir()
        maker(tmpfs / folder / "x.qcow2", size=MIB, **options)
        info = qemu_img.json("info", "--output=json", tmpfs / folder / "x.qcow2")
        text = str({**info, "actual-size": 0, "children": 0})
        infos.append(text.replace(f"/{folder}/", "/"))
    assert infos[0] == infos[1]


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 511},
        {"cluster_size": 256},
        {"cluster_size": 4 * MIB},
        {"refcount_bits": 3},
        {"refcount_bits": 0},
        {"refcount_bits": 128},
        {"compat": "0.10", "refcount_bits": 8},
        {"compat": "0.10", "lazy_refcounts": True},
        {"compat": "v2", "compression_type": "zstd"},
        {"cluster_size": 512, "size": 129 * GIB},
        {"size": 1 << 60, "compat": "1.1"},
        {"backing_fmt": "raw"},
        {"backing_file": "", "backing_fmt": "raw"},
        {"backing_file": "a", "backing_fmt": "raw", "preallocation": "metadata"},
    ],
)
def test_refused_in_their_words(tmpfs: Path, qemu_img: Oracle, options: dict[str, Any]) -> None:
    options = {"size": GIB, **options}
    with pytest.raises(UsageError) as ours:
        make(tmpfs / "ours.qcow2", **options)
    size = options.pop("size")
    theirs = qemu_img(
        "create", "-q", "-u", "-f", "qcow2", "-o", option_list(options), tmpfs / "x", str(size),
        check=False,
    )  # fmt: skip
    assert theirs.returncode == 1
    assert theirs.stderr.rstrip().endswith(str(ours.value))


@pytest.mark.parametrize(
    "options",
    [
        {"backing_file": "a" * 1024, "backing_fmt": "raw"},
        {"backing_file": "a" * 400, "backing_fmt": "raw", "cluster_size": 512},
    ],
)
def test_a_backing_file_name_that_does_not_fit(tmpfs: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="acking file name"):
        make(tmpfs / "a", size=MIB, **options)
    assert (tmpfs / "a").read_bytes() == b""


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(UsageError, match="data_size"):
        decode(Qcow2CreateOptions, {"size": MIB, "data_size": 1})


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc"])
def test_a_device_with_old_content(preallocation: str) -> None:
    """Storage that cannot be emptied first: what it held must not shine through."""

    async def run() -> None:
        graph = Graph(REGISTRY)
        options = {"driver": "memory", "node-name": "device", "size": 4 * MIB}
        node = await open_options(graph, options, Flags(read_only=False, discard_unmap=True))
        user = Root(node, "a test", Permission.CONSISTENT_READ)
        await io.write(node, 0, b"\x5a" * (4 * MIB))
        new = decode(Qcow2CreateOptions, {"size": 2 * MIB, "preallocation": preallocation})
        await create(graph, node, new)
        options = {"driver": "qcow2", "file": "device"}
        disk = Root(await open_options(graph, options, Flags()), "a reader", 1)
        assert await disk.read(0, 2 * MIB) == bytes(2 * MIB)
        assert not (await disk.node.driver.check(frozenset())).messages  # type: ignore[attr-defined]
        await disk.close()
        await user.close()

    asyncio.run(run())


def test_no_header_before_the_rest_is_stable(tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails, and whenever: what is left is no image, or a whole one."""
    events: list[tuple[str, int]] = []
    write, flush = io.write, io.flush
    limit = 0

    async def failing_write(node: Node, offset: int, data: Any) -> None:
        if len(events) == limit:
            raise StorageError("no", 5)
        events.append(("write", offset))
        await write(node, offset, data)

    async def failing_flush(node: Node) -> None:
        if len(events) == limit:
            raise StorageError("no", 5)
        events.append(("flush", 0))
        await flush(node)

    monkeypatch.setattr(io, "write", failing_write)
    monkeypatch.setattr(io, "flush", failing_flush)
    while True:
        events.clear()
        path = tmpfs / "a.qcow2"
        try:
            make(path, size=MIB, preallocation="metadata")
        except StorageError:
            left = path.read_bytes()
            if not any(kind == "write" and not offset for kind, offset in events):
                assert left[:4] == bytes(4)
            limit += 1
            continue
        break
    assert [kind for kind, _ in events[-3:]] == ["flush", "write", "flush"]
    assert events[-2] == ("write", 0)
    assert all(offset for kind, offset in events[:-2] if kind == "write")


@given(
    cluster_bits=st.integers(9, 21),
    refcount_order=st.integers(0, 6),
    clusters=st.integers(0, 1 << 20),
    mapped=st.booleans(),
)
def test_layout_counts_what_it_uses(
    cluster_bits: int, refcount_order: int, clusters: int, mapped: bool
) -> None:
    geometry = Geometry.make(cluster_bits, refcount_order=refcount_order)
    clusters = min(clusters, geometry.max_size >> cluster_bits)
    try:
        layout = plan(geometry, clusters << cluster_bits, mapped=mapped)
    except UsageError:
        assert mapped
        return
    entries = geometry.refcount_block_entries
    assert sorted(index for index, _ in layout.blocks) == list(
        range(-(-layout.used_clusters // entries))
    )
    places = [offset >> cluster_bits for _, offset in layout.blocks]
    taken = 1 + layout.table_clusters + len(places) + geometry.cluster_count(8 * layout.l1_size)
    taken += layout.data_clusters + (layout.l1_size if mapped else 0)
    assert taken == layout.used_clusters
    assert len(set(places)) == len(places)
    assert places[1:] == list(range(places[1], places[1] + len(places) - 1)) if places[1:] else True
    assert len(layout.blocks) * 8 <= layout.table_clusters << cluster_bits
