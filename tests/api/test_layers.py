"""Pictures of layers: the numbers are those of the map, and the drawings hold together."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

import blocklayer
from blocklayer.api import layers
from blocklayer.api.layers import Held
from blocklayer.api.sync import run
from blocklayer.cli.picture import svg, terminal
from blocklayer.cli.picture.colours import layer_colours
from cli.runs import ours
from oracles import Oracle

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


@pytest.fixture
def top(tmp_path: Path, qemu_io: Oracle) -> Path:
    """base: 1 MiB of data; middle: half of that again, compressed data and zeros; top: a little."""
    base, middle, top = (tmp_path / f"{name}.qcow2" for name in ("base", "middle", "top"))
    blocklayer.create(base, 16 * MIB)
    with blocklayer.open(base, writable=True) as disk:
        disk.write(0, b"a" * MIB)
    blocklayer.clone(base, middle)
    with blocklayer.open(middle, writable=True) as disk:
        disk.write(512 * KIB, b"b" * MIB)
        disk.write_zeroes(4 * MIB, 2 * MIB)
    qemu_io("-c", "write -c -P 7 8M 1M", middle)
    blocklayer.clone(middle, top)
    with blocklayer.open(top, writable=True) as disk:
        disk.write(MIB, b"c" * 64 * KIB)
    return top


def test_who_owns_how_much(top: Path) -> None:
    with blocklayer.open(top) as disk:
        found = run(layers.layer_map(disk.aio.root.node, cells=16))
    shown = [layer.shown for layer in found.layers]
    assert shown == [
        Held(data=64 * KIB),
        Held(data=MIB - 64 * KIB, compressed=MIB, zero=2 * MIB),
        Held(data=512 * KIB),
    ]
    assert found.absent == 16 * MIB - sum(held.total for held in shown)
    assert found.cells[0] == {1: Held(data=512 * KIB), 2: Held(data=512 * KIB)}
    assert found.cells[1] == {0: Held(data=64 * KIB), 1: Held(data=448 * KIB)}
    assert found.cells[8] == {1: Held(compressed=MIB)}
    assert found.cells[15] == {}


def test_what_commits_and_streams_would_move(top: Path) -> None:
    with blocklayer.open(top) as disk:
        found = run(layers.chain(disk.aio.root.node))
    active, middle, base = found.layers
    assert (active.commit_down, active.commit_into, active.stream_onto) == (64 * KIB, None, None)
    assert (middle.commit_down, middle.commit_into, middle.stream_onto) == (2 * MIB, 64 * KIB, 0)
    assert (base.commit_down, base.commit_into, base.stream_onto) == (
        None, 2 * MIB, 2 * MIB - 64 * KIB,
    )  # fmt: skip
    assert found.stream_all == 2 * MIB - 64 * KIB + 512 * KIB
    assert (active.hidden, middle.hidden, base.hidden) == (0, 64 * KIB, 512 * KIB)
    assert middle.own == Held(data=MIB, compressed=MIB, zero=2 * MIB)


def test_a_commit_moves_what_was_said(top: Path, tmp_path: Path) -> None:
    """The real job, asked how much it copied."""
    from blocklayer.api.disk import Disk
    from blocklayer.graph.permission import Permission
    from blocklayer.graph.root import Root
    from blocklayer.jobs.commit import commit
    from blocklayer.jobs.copying import CopyOptions

    async def moved() -> tuple[int, int, bytes]:
        image = {
            "driver": "qcow2",
            "file": {"filename": str(top)},
            "backing": {"backing": {"read-only": False}},
        }
        async with await Disk.open(image, writable=True) as disk:
            said = await layers.chain(disk.root.node)
            base = Root(
                disk.root.node.chain()[2],
                "commit",
                Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE,
            )
            before = await layers.chain(base.node)
            await commit(disk.root, base, CopyOptions())
            after = await layers.chain(base.node)
            await base.close()
            grown = after.layers[0].own.stored - before.layers[0].own.stored
            return said.layers[2].commit_into or 0, grown, await disk.read(0, 2 * MIB)

    told, grown, _ = run(moved())
    # Half a MiB of what was moved lies over data that the base had.
    assert told == grown + 512 * KIB


@given(
    size=st.integers(1, 400).map(lambda sectors: sectors * 512),
    runs=st.lists(st.tuples(st.integers(0, 399), st.integers(1, 64)), max_size=8),
    cells=st.integers(1, 300),
    cut=st.tuples(st.integers(0, 1 << 17), st.integers(0, 1 << 18)),
)
def test_every_byte_counts_once(
    tmp_path_factory: pytest.TempPathFactory,
    size: int,
    runs: list[tuple[int, int]],
    cells: int,
    cut: tuple[int, int],
) -> None:
    folder = tmp_path_factory.mktemp("layers")
    names = [folder / "0", folder / "1"]
    blocklayer.create(names[0], size, cluster_size=512)
    blocklayer.clone(*names, cluster_size=512)
    for index, (first, count) in enumerate(runs):
        with blocklayer.open(names[index % 2], writable=True) as disk:
            start = min(first * 512, size - 512)
            disk.write(start, b"x" * min(count * 512, size - start))
    with blocklayer.open(names[1]) as disk:
        start, length = min(cut[0] & ~511, size), cut[1] & ~511
        found = run(layers.layer_map(disk.aio.root.node, cells=cells, offset=start, length=length))
        entries = list(disk.map(start, length))
    for depth, layer in enumerate(found.layers):
        mapped = sum(e.length for e in entries if e.depth == depth and e.data)
        assert layer.shown.stored == mapped
        assert layer.shown.total == sum(cell.get(depth, Held()).total for cell in found.cells)
    assert found.absent + sum(layer.shown.total for layer in found.layers) == found.length
    drawn = svg.draw(found)
    ElementTree.fromstring(drawn)
    assert terminal.draw(found, 80, coloured=False)


SHAPES = [(1, MIB), (2, 20 * GIB), (7, TIB), (30, 10 * TIB)]


@pytest.mark.parametrize(("count", "size"), SHAPES)
def test_any_chain_can_be_drawn(tmp_path: Path, count: int, size: int) -> None:
    names = [f"a rather long name, <&> of layer {number}" for number in range(count)]
    blocklayer.create(tmp_path / names[0], size)
    for below, name in itertools.pairwise(names):
        blocklayer.clone(tmp_path / below, tmp_path / name)
    for number, name in enumerate(names):
        with blocklayer.open(tmp_path / name, writable=True) as disk:
            disk.write((number * size // count) & ~65535, b"x" * 65536)
    outcome = ours(["map", "--picture", "out.svg", names[-1]], tmp_path)
    assert (outcome.code, outcome.out) == (0, "")
    _check_svg((tmp_path / "out.svg").read_text(), count)
    outcome = ours(["map", "--picture", "-", names[-1]], tmp_path)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 160
    assert sum(line.startswith("■") for line in lines) == count
    outcome = ours(["chain", names[-1]], tmp_path)
    assert outcome.out.count("●") == count
    told = json.loads(ours(["chain", "--output=json", names[-1]], tmp_path).out)
    assert [layer["depth"] for layer in told["layers"]] == list(range(count))
    assert told["virtual-size"] == size
    assert told["stream-all"] == (count - 1) * 65536


def _check_svg(text: str, count: int) -> None:
    root = ElementTree.fromstring(text)
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    space = "{http://www.w3.org/2000/svg}"
    colours = {path.attrib["fill"] for path in root.iter(f"{space}path")}
    assert len(colours) == count, "each layer has data, and a colour of its own"
    for path in root.iter(f"{space}path"):
        for x, y, w, h in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h", path.attrib["d"]):
            assert float(h) >= 1
            assert float(x) + float(w) <= width
            assert float(y) + float(h) <= height
    texts = [text.text or "" for text in root.iter(f"{space}text")]
    assert sum("<&>" in text for text in texts) >= 1


def test_colours_are_told_apart() -> None:
    for count in range(1, 31):
        colours = layer_colours(count)
        assert len(set(colours)) == count
        for one, other in itertools.pairwise(colours):
            assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 40


def test_colours_on_a_terminal(top: Path) -> None:
    with blocklayer.open(top) as disk:
        node = disk.aio.root.node
        found = run(layers.layer_map(node, cells=terminal.cells(100)))
        plain = terminal.draw(found, 100, coloured=False)
        coloured = terminal.draw(found, 100, coloured=True)
        chain = run(layers.chain(node))
        drawn = terminal.draw_chain(chain, 100, coloured=True)
    assert "\x1b" not in plain
    assert re.search(r" 2+1+01+·", plain)
    assert "▓" in coloured
    unpainted = re.sub(r"\x1b\[[\d;]*m", "", drawn)
    assert unpainted == terminal.draw_chain(chain, 100, coloured=False)
    assert "committing it down moves 2 MiB" in unpainted
    assert "To stand alone, top.qcow2 would take in 2.44 MiB." in unpainted
    assert max(map(len, unpainted.splitlines())) <= 100


def test_an_empty_disk_and_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    blocklayer.create(tmp_path / "none", 0)
    assert ours("map --picture - none", tmp_path).code == 0
    assert ours("map --picture x.svg none", tmp_path).code == 0
    assert ours("chain none", tmp_path).code == 0
    outcome = ours("map --picture no/folder.svg none", tmp_path)
    assert (outcome.code, "Could not write" in outcome.err) == (1, True)
