"""Persistent bitmaps beside QEMU: it reads what we keep, we read what it keeps, bit by bit."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blocklayer.codec.qcow2 import bitmaps as codec
from blocklayer.codec.qcow2.header import EXTENSION_BITMAPS, ImageHeader, decode_header
from blocklayer.errors import BlockError, FormatError, UnsupportedError, UsageError
from blocklayer.graph import bitmaps
from blocklayer.testing.contract import apply
from blocklayer.testing.strategies import Request
from oracles import Oracle, require
from qcow2.images import driver_of, opened, run

KIB = 1024


class StorageDaemon:
    """The real daemon with one image open, read-only, as node ``n``."""

    def __init__(self, image: Path, *, read_only: bool = True) -> None:
        node = f"driver=qcow2,node-name=n,file.driver=file,file.filename={image}"
        node += ",read-only=on" if read_only else ""
        command = [require("qemu-storage-daemon").path, "--blockdev", node]
        command += ["--chardev", "stdio,id=m", "--monitor", "chardev=m"]
        self._process = subprocess.Popen(
            ["timeout", "60", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()
        self.do("qmp_capabilities")

    def __enter__(self) -> StorageDaemon:
        return self

    def __exit__(self, *failure: object) -> None:
        self.do("quit")
        self._process.communicate()

    def _read(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())

    def do(self, command: str, **arguments: Any) -> Any:
        """The command's answer."""
        assert self._process.stdin
        line = json.dumps({"execute": command, "arguments": arguments})
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        while True:
            answer = self._read()
            if "return" in answer or "error" in answer:
                return answer["return"]

    def bitmaps(self) -> dict[str, tuple[bool, int, int, str]]:
        """Name: recording, granularity, count, hash."""
        nodes = self.do("query-named-block-nodes")
        found = next(node for node in nodes if node["node-name"] == "n").get("dirty-bitmaps", [])
        return {
            each["name"]: (
                each["recording"],
                each["granularity"],
                each["count"],
                self.do("x-debug-block-dirty-bitmap-sha256", node="n", name=each["name"])["sha256"],
            )
            for each in found
        }


async def _ours(image: Path) -> dict[str, tuple[bool, int, int, str]]:
    async with opened(image, read_only=True) as root:
        found = root.node.dirty_bitmaps
        await bitmaps.load(found.values())
        return {
            name: (b.info().recording, b.granularity, b.count, b.sha256())
            for name, b in found.items()
        }


def same_bitmaps(image: Path) -> dict[str, tuple[bool, int, int, str]]:
    ours = run(_ours(image))
    with StorageDaemon(image) as daemon:
        assert daemon.bitmaps() == ours
    return ours


def random_requests(seed: int, size: int, cluster_size: int) -> list[Request]:
    chance = random.Random(seed)
    found = []
    for _ in range(12):
        kind = chance.choice(("write", "write", "zero", "unmap", "discard"))
        offset = chance.randrange(0, size, 512)
        length = min(size - offset, chance.choice((512, 1024, 20 * KIB, 300 * KIB)))
        if kind == "discard":
            # Parts of clusters are another matter: there, nothing changes.
            offset -= offset % cluster_size
            length = min(size - offset, length - length % cluster_size + cluster_size)
        found.append(Request(kind, offset, length, chance.randint(1, 255)))
    return found


@pytest.mark.parametrize("cluster_size", [512, 65536])
@pytest.mark.parametrize("seed", range(3))
def test_the_same_requests_leave_the_same_bits(
    seed: int, cluster_size: int, tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle
) -> None:
    size = 4 << 20
    mine, real = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", real, str(size))
    for granularity in ("512", "4k", "64k", "2G"):
        qemu_img("bitmap", "--add", "-g", granularity, real, f"b{granularity}")
    qemu_img("bitmap", "--add", "--disable", real, "off")
    shutil.copy(real, mine)

    async def main(requests: list[Request]) -> None:
        async with opened(mine) as root:
            for request in requests:
                await apply(root, request)

    for part in range(2):
        requests = random_requests(seed * 10 + part, size, cluster_size)
        run(main(requests))
        commands = [word for each in requests for word in ("-c", each.command())]
        qemu_io("-f", "qcow2", "-d", "unmap", *commands, real)
        assert same_bitmaps(mine) == same_bitmaps(real)
        for image in (mine, real):
            qemu_img("check", "-q", "-f", "qcow2", image)
    # And on: each goes on with what the other one left.
    run(main(requests))
    qemu_io("-f", "qcow2", "-c", "write -q 0 512", mine)
    run(_write(real, 0, 512))
    run(_write(mine, 100 * KIB, 512))
    qemu_io("-f", "qcow2", "-c", "write -q 100k 512", real)
    assert same_bitmaps(mine) == same_bitmaps(real)


async def _write(image: Path, offset: int, length: int) -> None:
    async with opened(image) as root:
        await root.write(offset, b"x" * length)


def test_bits_that_are_all_set_take_no_space(tmp_path: Path, qemu_img: Oracle) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", image, "5M")
    qemu_img("bitmap", "--add", "-g", "512", image, "b")

    async def main() -> None:
        async with opened(image) as root:
            await root.write(0, b"x" * (5 << 20))
        async with opened(image, read_only=True) as root:
            found = driver_of(root).stored_bitmaps.entries["b"]
        table = image.read_bytes()[found.bitmap_table_offset :][: found.bitmap_table_size * 8]
        assert table[:16] == 2 * (b"\0" * 7 + b"\1")

    run(main())
    assert same_bitmaps(image)["b"][2] == 5 << 20
    qemu_img("check", "-q", image)


def test_merging_and_clearing_beside_the_daemon(tmp_path: Path, qemu_img: Oracle) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "40M")
    for name, granularity in (("fine", "512"), ("coarse", "64k"), ("sum", "4k"), ("all", "1M")):
        qemu_img("bitmap", "--add", "-g", granularity, image, name)

    async def main() -> None:
        async with opened(image) as root:
            found = root.node.dirty_bitmaps
            found["coarse"].disable()
            await root.write(300, b"x" * 5000)
            found["fine"].disable()
            found["coarse"].enable()
            await root.write(7 << 20, b"x" * 5000)
            for name in ("sum", "all"):
                found[name].clear()
                found[name].merge(found["fine"], found["coarse"])

    copy = tmp_path / "copy.qcow2"
    shutil.copy(image, copy)
    run(main())
    ours = same_bitmaps(image)
    with StorageDaemon(copy, read_only=False) as daemon:
        for target in ("fine", "coarse"):
            daemon.do("block-dirty-bitmap-disable", node="n", name=target)
    qemu_img("bitmap", "--merge", "fine", "-b", image, "-F", "qcow2", copy, "sum")
    qemu_img("bitmap", "--merge", "coarse", "-b", image, "-F", "qcow2", copy, "sum")
    qemu_img("bitmap", "--merge", "sum", copy, "all")
    theirs = same_bitmaps(copy)
    assert theirs["sum"] == ours["sum"]
    assert theirs["all"] == ours["all"]


def test_while_it_is_open_it_is_in_use(tmp_path: Path, qemu_img: Oracle) -> None:
    image, crashed = tmp_path / "a.qcow2", tmp_path / "crashed.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    qemu_img("bitmap", "--add", image, "b")

    def flags(path: Path) -> list[str]:
        info = qemu_img.json("info", "-U", "--output=json", path)
        found = info["format-specific"]["data"]["bitmaps"]
        return list(found[0]["flags"])

    async def main() -> None:
        async with opened(image, read_only=True):
            assert flags(image) == ["auto"]
        async with opened(image) as root:
            assert flags(image) == ["in-use", "auto"]
            await root.write(0, b"x" * 512)
            shutil.copy(image, crashed)
        assert flags(image) == ["auto"]
        async with opened(crashed) as root:
            bitmap = bitmaps.find(root.node, "b")
            for act in (bitmap.clear, bitmap.enable, bitmap.disable, bitmap.freeze):
                with pytest.raises(UsageError, match="inconsistent and cannot be used"):
                    act()
            with pytest.raises(UsageError, match="inconsistent"):
                await root.truncate(2 << 20)
            assert bitmap.info().inconsistent
        assert flags(crashed) == ["in-use", "auto"]
        async with opened(crashed) as root:
            await bitmaps.remove(bitmaps.find(root.node, "b"))
            await root.truncate(2 << 20)

    run(main())
    qemu_img("check", "-q", crashed)
    assert (
        "bitmaps" not in qemu_img.json("info", "--output=json", crashed)["format-specific"]["data"]
    )


def test_resizing(tmp_path: Path, qemu_img: Oracle) -> None:
    """What a disk grows by is dirty where a bitmap records: it may be there for the second time."""
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    qemu_img("bitmap", "--add", image, "on")
    qemu_img("bitmap", "--add", "--disable", image, "off")

    async def main() -> None:
        async with opened(image) as root:
            await root.truncate(700 * KIB, shrink=True)
            await root.truncate(2 << 20)
            assert list(root.node.dirty_bitmaps["on"].runs()) == [(640 * KIB, 1408 * KIB)]
            await root.write(0, b"x")
            with pytest.raises(UnsupportedError, match="to 0 bytes"):
                await root.truncate(0, shrink=True)

    run(main())
    found = same_bitmaps(image)
    assert found["off"][2] == 0
    assert found["on"][2] >= (2 << 20) - 700 * KIB
    qemu_img("resize", "-q", image, "3M")
    qemu_img("resize", "-q", "--shrink", image, "1M")
    same_bitmaps(image)
    qemu_img("check", "-q", image)


@pytest.fixture
def damaged(tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle) -> Path:
    image = tmp_path / "damaged.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "10M")
    qemu_img("bitmap", "--add", image, "b0")
    qemu_img("bitmap", "--add", "--disable", image, "b1")
    qemu_io("-f", "qcow2", "-c", "write -q 0 64k", image)
    return image


def _places(image: Path) -> tuple[ImageHeader, int, int]:
    """The header, and where the extension and the directory are."""
    data = image.read_bytes()
    header = decode_header(data[:65536])
    extension = codec.decode_bitmaps_extension(header.extension(EXTENSION_BITMAPS) or b"")
    return header, header.extension_offset(EXTENSION_BITMAPS), extension.bitmap_directory_offset


def _patch(image: Path, offset: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)


DAMAGE = {
    "no bitmaps": ("extension", 0, struct.pack(">I", 0)),
    "more bitmaps than there are": ("extension", 0, struct.pack(">I", 3)),
    "fewer bitmaps than there are": ("extension", 0, struct.pack(">I", 1)),
    "reserved": ("extension", 4, struct.pack(">I", 1)),
    "directory too large": ("extension", 8, struct.pack(">Q", 1 << 40)),
    "directory elsewhere": ("extension", 16, struct.pack(">Q", 1 << 40)),
    "directory unaligned": ("extension", 16, struct.pack(">Q", 0x80010)),
    "unknown flag": ("directory", 12, struct.pack(">I", 8)),
    "unknown type": ("directory", 16, b"\2"),
    "granularity": ("directory", 17, b"\5"),
    "table of another size": ("directory", 8, struct.pack(">I", 2)),
    "huge table": ("directory", 8, struct.pack(">I", 1 << 31)),
    "table unaligned": ("directory", 0, struct.pack(">Q", 0x123)),
    "name past the end": ("directory", 18, struct.pack(">H", 1000)),
    "extra data past the end": ("directory", 20, struct.pack(">I", 1 << 31)),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_directories_are_refused(what: str, damaged: Path, qemu_img: Oracle) -> None:
    """As by the real tool. They can be checked, and nothing is written to them."""
    _, extension, directory = _places(damaged)
    part, offset, data = DAMAGE[what]
    _patch(damaged, (extension if part == "extension" else directory) + offset, data)
    before = damaged.read_bytes()
    assert qemu_img("info", damaged, check=False).returncode == 1

    async def main(read_only: bool) -> None:
        with pytest.raises(FormatError, match="bitmap"):
            async with opened(damaged, read_only=read_only):
                pass

    run(main(True))
    run(main(False))
    assert damaged.read_bytes() == before


@pytest.mark.parametrize("word", [1 << 60, 0x10001, 0x123, 1 << 55, (1 << 40)])
def test_damaged_tables_are_refused_when_read(word: int, damaged: Path) -> None:
    _, _, directory = _places(damaged)
    table = int.from_bytes(damaged.read_bytes()[directory : directory + 8], "big")
    _patch(damaged, table, struct.pack(">Q", word))

    async def main() -> None:
        async with opened(damaged, read_only=True) as root:
            assert await root.read(0, 512)
            with pytest.raises(FormatError, match="bitmap 'b0'"):
                await bitmaps.find(root.node, "b0").load()
        with pytest.raises(BlockError, match="bitmap 'b0'"):
            async with opened(damaged):
                pass

    run(main())


@pytest.mark.parametrize("compatible", [True, False])
def test_extra_data_is_kept(compatible: bool, tmp_path: Path, qemu_img: Oracle) -> None:
    """A bitmap with extra data is of use only if its flags say that who ignores it does no harm."""
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    qemu_img("bitmap", "--add", image, "b")
    _, extension, directory = _places(image)
    raw = image.read_bytes()[directory:]
    entry = codec.decode_directory(raw[:32], 1)[0]
    entry.extra_data = b"abcdefgh12345678"
    entry.flags |= codec.FLAG_EXTRA_DATA_COMPATIBLE if compatible else 0
    _patch(image, directory, entry.encode())
    _patch(image, extension + 8, struct.pack(">Q", len(entry.encode())))

    async def main() -> None:
        async with opened(image) as root:
            bitmap = bitmaps.find(root.node, "b")
            assert bitmap.inconsistent != compatible
            await root.write(0, b"x")
        async with opened(image, read_only=True) as root:
            kept = driver_of(root).stored_bitmaps.entries["b"]
            assert kept.extra_data == entry.extra_data
            assert kept.extra_data_compatible == compatible
            assert kept.in_use != compatible
            if compatible:
                await bitmaps.load(root.node.dirty_bitmaps.values())
                assert list(bitmaps.find(root.node, "b").runs()) == [(0, 64 * KIB)]

    run(main())


def test_amending_keeps_them(tmp_path: Path, qemu_img: Oracle) -> None:
    from blocklayer.graph.amend import amend

    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    qemu_img("bitmap", "--add", image, "b")

    async def main() -> None:
        async with opened(image) as root:
            await root.write(0, b"x")
            for options in ({"refcount_bits": "64"}, {"lazy_refcounts": "on"}, {"size": "2M"}):
                await amend(root, options, lambda done, total: None)
            await root.write(1 << 20, b"x")

    run(main())
    assert same_bitmaps(image)["b"][2] >= 1 << 20
    qemu_img("check", "-q", image)


def test_reopening(tmp_path: Path, qemu_img: Oracle) -> None:
    """Read-only: stored, and marked as such. For writing again: the same bitmaps go on."""
    from blocklayer.graph.reopen import set_read_only
    from blocklayer.graph.root import drained

    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    qemu_img("bitmap", "--add", image, "b")

    async def main() -> None:
        async with opened(image) as root:
            node = root.node
            bitmap = bitmaps.find(node, "b")
            await root.write(0, b"x")
            root.taken &= 1
            for read_only in (True, False, True, False):
                async with drained(root.graph, node):
                    await set_read_only(node, read_only)
                assert bitmaps.find(node, "b") is bitmap
                assert bitmap.read_only == read_only
                assert node.watchers == (bitmap,)
                info = qemu_img.json("info", "-U", "--output=json", image)
                flags = info["format-specific"]["data"]["bitmaps"][0]["flags"]
                assert flags == (["auto"] if read_only else ["in-use", "auto"])
                if read_only:
                    with pytest.raises(UsageError, match="readonly and cannot be modified"):
                        bitmap.clear()
            assert list(bitmap.runs()) == [(0, 64 * KIB)]

    run(main())
    assert same_bitmaps(image)["b"][2] == 64 * KIB


@pytest.mark.parametrize("jobs", ["commit", "rebase", "convert"])
def test_jobs_that_write_are_heard(jobs: str, tmp_path: Path, qemu_img: Oracle) -> None:
    """Also where bytes are moved by threads, past the loop."""
    from cli.runs import ours

    base, top, other = (str(tmp_path / name) for name in ("base", "top", "other"))
    target = {"commit": base, "rebase": top, "convert": other}[jobs]
    commands = [
        f"create -q -f qcow2 {base} 20M",
        f"create -q -f qcow2 {other} 20M",
        f"create -q -f qcow2 -b {base} -F qcow2 {top}",
    ]
    for command in commands:
        qemu_img(*command.split())
    io = require("qemu-io")
    io("-f", "qcow2", "-c", "write -q -P 1 0 9M", other)
    io("-f", "qcow2", "-c", "write -q -P 2 3M 5M", "-c", "write -q -z 10M 1M", top)
    qemu_img("bitmap", "--add", target, "b")
    before = tmp_path / "before.raw"
    after = tmp_path / "after.raw"
    mine = {
        "commit": f"commit -q {top}",
        "rebase": f"rebase -q -b {other} -F qcow2 {top}",
        "convert": f"convert -n -O qcow2 {top} {other}",
    }
    for image in (before, after):
        qemu_img("convert", "-O", "raw", target, image)
        if image is before:
            if jobs == "rebase":
                # What the guest reads stays the same: compare what the layer itself is over.
                qemu_img("rebase", "-q", "-u", "-b", other, "-F", "qcow2", target)
                qemu_img("convert", "-O", "raw", target, image)
                qemu_img("rebase", "-q", "-u", "-b", base, "-F", "qcow2", target)
            assert ours(mine[jobs], tmp_path).code == 0
    old, new = before.read_bytes(), after.read_bytes()

    async def main() -> None:
        async with opened(Path(target), read_only=True) as root:
            bitmap = bitmaps.find(root.node, "b")
            await bitmap.load()
            changed = 0
            for offset in range(0, len(new), 64 * KIB):
                if old[offset : offset + 64 * KIB] != new[offset : offset + 64 * KIB]:
                    changed += 1
                    assert bitmap.is_dirty(offset), hex(offset)
            assert changed

    run(main())


def test_from_python(tmp_path: Path) -> None:
    import blocklayer

    image, copy = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    for path in (image, copy):
        blocklayer.create(path, "1M")
    with blocklayer.open(image, writable=True) as disk:
        disk.bitmaps.add("monday", granularity=4096)
        disk.bitmaps.add("passing", persistent=False)
        disk.write(5000, b"x" * 5000)
        assert disk.bitmaps.dirty("monday") == [(4096, 8192)]
        assert disk.bitmaps.dirty("monday", 8192, 100) == [(8192, 100)]
        disk.bitmaps.disable("monday")
        disk.write(1 << 19, b"x")
        assert [each.name for each in disk.bitmaps.query()] == ["passing", "monday"]
        assert disk.bitmaps.dirty("passing") == [(0, 64 * KIB), (512 * KIB, 64 * KIB)]
    with (
        blocklayer.open(image) as source,
        blocklayer.open(copy, writable=True) as disk,
    ):
        assert source.bitmaps.names() == ["monday"]
        disk.bitmaps.add("sum")
        disk.bitmaps.merge("sum", "monday", of=source)
        assert disk.bitmaps.dirty("sum") == [(0, 64 * KIB)]
        disk.bitmaps.clear("sum")
        disk.bitmaps.enable("sum")
        assert disk.bitmaps.query()[0].count == 0
        disk.bitmaps.remove("sum")
        assert disk.bitmaps.names() == []


def test_no_room_to_store_them(tmp_path: Path) -> None:
    """The disk's content is safe, the bitmaps are marked, and whoever closes it is told."""
    import errno

    from proof.crashes import new_image, take

    async def main() -> None:
        disk = await new_image(100 * KIB)
        root = await take(disk)
        bitmaps.add(root.node, "b", granularity=512, persistent=True)
        await root.write(0, b"x" * 5000)
        await root.close()
        root = await take(disk)
        await root.write(KIB * 50, b"y" * 5000)
        await root.flush()
        disk.fail(1, errno.ENOSPC, kinds=("write",), repeat=True)
        with pytest.raises(BlockError, match=r"Lost persistent bitmaps of .*No space"):
            await root.close()
        disk.fail(0)
        root = await take(disk)
        assert bitmaps.find(root.node, "b").inconsistent
        assert await root.read(KIB * 50, 5000) == b"y" * 5000
        await root.close()

    run(main())


def test_a_table_that_names_metadata_is_not_freed(tmp_path: Path, qemu_img: Oracle) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "10M")
    qemu_img("bitmap", "--add", image, "b")
    header, _, directory = _places(image)
    table = int.from_bytes(image.read_bytes()[directory : directory + 8], "big")
    _patch(image, table, struct.pack(">Q", header.l1_table_offset))

    async def main() -> None:
        with pytest.raises(BlockError, match="overlaps with active L1 table"):
            async with opened(image) as root:
                await bitmaps.remove(bitmaps.find(root.node, "b"))

    run(main())
    found = qemu_img("check", image, check=False)
    assert found.returncode == 2, found.stdout


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qemu_img: Oracle) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", image, "10M")

    async def main() -> None:
        async with opened(image) as root:
            node = root.node
            monkeypatch.setattr(codec, "MAX_DIRECTORY_SIZE", 3 * 32)
            for name in "abc":
                bitmaps.add(node, name, persistent=True)
            with pytest.raises(UnsupportedError, match="Not enough space"):
                bitmaps.add(node, "d", persistent=True)
            monkeypatch.setattr(codec, "MAX_BITMAPS", 3)
            with pytest.raises(UnsupportedError, match="Maximum number"):
                bitmaps.add(node, "d", persistent=True)
            assert list(node.dirty_bitmaps) == ["a", "b", "c"]
            bitmaps.add(node, "d")

    run(main())
    assert list(same_bitmaps(image)) == ["c", "b", "a"]


def test_hundreds_of_bitmaps(tmp_path: Path, qemu_img: Oracle) -> None:
    """The directory takes many clusters, and shrinks again."""
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", image, "1M")
    names = [f"checkpoint {number} {'é' * (number % 40)}" for number in range(300)]

    async def add() -> None:
        async with opened(image) as root:
            for name in names:
                bitmaps.add(root.node, name, granularity=512, persistent=True)
            await root.write(5000, b"x" * 1000)

    async def remove() -> None:
        async with opened(image) as root:
            for name in names[1:]:
                await bitmaps.remove(bitmaps.find(root.node, name))

    run(add())
    found = same_bitmaps(image)
    assert set(found) == set(names)
    assert {count for _, _, count, _ in found.values()} == {1536}
    qemu_img("check", "-q", image)
    run(remove())
    assert set(same_bitmaps(image)) == {names[0]}
    qemu_img("check", "-q", image)
