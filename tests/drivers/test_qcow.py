"""qcow, version 1: new images, compressed clusters, emptying, and the old encryption."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

import blocklayer
from blocklayer import BlockError
from blocklayer.cli.main import main
from blocklayer.graph.driver import FormatDriver
from drivers.images import MIB, Kind, read_all
from drivers.test_foreign_crashes import new_disk
from oracles import Oracle
from proof.chains import run
from proof.crashes import Bench, moments, spread, take

KIB = 1024


def content(size: int, seed: int = 1) -> bytes:
    """Bytes that can be packed, between some that cannot."""
    chance = random.Random(seed)
    data = bytearray()
    while len(data) < size:
        data += chance.choice([bytes(7000), b"some text, " * 500, chance.randbytes(5000)])
    return bytes(data[:size])


@pytest.mark.parametrize("size", [1, 512, 1000, MIB, 10 * MIB, 200 << 30])
@pytest.mark.parametrize("backing", [None, "base", "a/longer/name/of/a/base"])
def test_a_new_image_is_what_qemu_makes(
    size: int, backing: str | None, tmpfs: Path, qemu_img: Oracle
) -> None:
    ours, theirs = tmpfs / "ours", tmpfs / "theirs"
    extra: list[object] = []
    options: dict[str, object] = {}
    if backing is not None:
        place = tmpfs / backing
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(bytes(MIB))
        extra = ["-b", backing, "-F", "raw"]
        options = {"backing": backing, "backing_format": "raw"}
    qemu_img("create", "-q", "-f", "qcow", *extra, theirs, str(size), cwd=tmpfs)
    blocklayer.create(ours, size, format="qcow", **options)  # type: ignore[arg-type]
    assert ours.read_bytes() == theirs.read_bytes()


def test_what_cannot_be_made(tmpfs: Path) -> None:
    for size, said in ((0, "cannot be zero length"), (1 << 60, "Image too large")):
        with pytest.raises(BlockError, match=said):
            blocklayer.create(tmpfs / "image", size, format="qcow")
    assert not (tmpfs / "image").exists()


def test_we_read_what_qemu_compressed_and_write_over_it(
    tmpfs: Path, qemu_img: Oracle, qemu_io: Oracle
) -> None:
    raw, image = tmpfs / "raw", tmpfs / "image"
    model = bytearray(content(MIB))
    raw.write_bytes(model)
    # It fails without a word after clusters that cannot be packed, but writes all of them.
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow", raw, image, check=False)
    qemu_img("compare", "-f", "qcow", "-F", "raw", image, raw)
    assert read_all(image, "qcow") == model
    with blocklayer.open(image, format="qcow", writable=True) as disk:
        for offset in range(1000, len(model) - 9000, 77777):
            disk.write(offset, b"n" * 8000)
            model[offset : offset + 8000] = b"n" * 8000
    qemu_io("-f", "qcow", "-c", "write -P 5 3000 10000", image)
    model[3000:13000] = b"\5" * 10000
    assert read_all(image, "qcow") == model
    raw.write_bytes(model)
    qemu_img("compare", "-f", "qcow", "-F", "raw", image, raw)


def test_qemu_reads_what_we_compress(tmpfs: Path, qemu_img: Oracle) -> None:
    raw, image = tmpfs / "raw", tmpfs / "image"
    data = content(MIB + 1536, seed=2)
    raw.write_bytes(data)
    for level in ([], ["--compression-level", "9"]):
        command = ["img", "convert", "-c", *level, "-f", "raw", "-O", "qcow", str(raw), str(image)]
        if main(command) != 0:
            assert level, "plain -c must work"
            continue
        qemu_img("compare", "-f", "qcow", "-F", "raw", image, raw)
        assert image.stat().st_size < len(data) * 3 // 4
    with blocklayer.open(image, format="qcow", writable=True) as disk:
        # Compressed, plain, and compressed again.
        disk.write(0, data[4096:8192])
    raw.write_bytes(data[4096:8192] + data[4096:])
    qemu_img("compare", "-f", "qcow", "-F", "raw", image, raw)


def test_compressed_writes_over_everything(tmpfs: Path, qemu_img: Oracle) -> None:
    """Over absent clusters, plain ones, compressed ones, and at the disk's end."""
    raw, image = tmpfs / "raw", tmpfs / "image"
    size = 64 * KIB + 512
    model = bytearray(size)

    async def work() -> None:
        await blocklayer.aio.create(image, size, format="qcow")
        async with await blocklayer.aio.Disk.open(image, format="qcow", writable=True) as disk:
            chance = random.Random(3)
            await disk.write(0, b"p" * 20000)
            model[:20000] = b"p" * 20000
            for number in range(60):
                start = chance.randrange(17) * 4096
                length = min(4096 * chance.randrange(1, 4), size - start)
                data = content(length, seed=number)
                await disk.root.write_compressed(start, data)
                model[start : start + length] = data
                if number % 9 == 0:
                    await disk.flush()

    run(work())
    assert read_all(image, "qcow") == model
    raw.write_bytes(model)
    qemu_img("compare", "-f", "qcow", "-F", "raw", image, raw)


def test_commit_empties_the_overlay(tmpfs: Path, qemu_img: Oracle) -> None:
    base, overlay = tmpfs / "base", tmpfs / "overlay"
    base.write_bytes(b"b" * MIB)
    blocklayer.create(overlay, format="qcow", backing="base", backing_format="raw")
    size = overlay.stat().st_size
    with blocklayer.open(overlay, format="qcow", writable=True) as disk:
        disk.write(5000, b"o" * 70000)
        before = disk.read(0, MIB)
    assert main(["img", "commit", "-f", "qcow", str(overlay)]) == 0
    assert overlay.stat().st_size < size
    assert base.read_bytes() == before == read_all(overlay, "qcow")
    with blocklayer.open(overlay, format="qcow", writable=True) as disk:
        disk.write(9, b"again")
        assert disk.read(0, 20) == before[:9] + b"again" + before[14:20]
    raw = tmpfs / "raw"
    raw.write_bytes(before[:9] + b"again" + before[14:])
    qemu_img("compare", "-f", "qcow", "-F", "raw", overlay, raw)


def test_power_failures_while_clusters_are_compressed() -> None:
    async def main() -> None:
        disk = await new_disk(Kind("qcow", size=128 * KIB))
        bench = await Bench.open(disk, format="qcow")
        for number in range(3):
            await bench.do("compress", 8 * KIB * number, 8 * KIB, number + 1)
            await bench.write(4 * KIB * number + 100, 600, number + 9)
            await bench.flush()
        await bench.root.close()
        for state in spread(moments(disk), 160):
            root = await take(state.disk(), format="qcow")
            problem = bench.explain(state.position, await root.read(0, 128 * KIB))
            assert problem is None, f"{state}: {problem}"
            await root.close()

    run(main())


def test_power_failures_while_it_is_emptied() -> None:
    async def main() -> None:
        disk = await new_disk(Kind("qcow", size=64 * KIB))
        bench = await Bench.open(disk, format="qcow")
        await bench.write(0, 64 * KIB, 1)
        await bench.flush()
        driver = bench.root.node.driver
        assert isinstance(driver, FormatDriver)
        await driver.make_empty()
        await bench.root.write(0, b"\2" * 4096)
        await bench.root.flush()
        await bench.root.close()
        old = bench.model.visible()
        for state in spread(moments(disk), 160):
            root = await take(state.disk(), format="qcow")
            for at in range(0, 64 * KIB, 4096):
                found = await root.read(at, 4096)
                # Nothing of another cluster: that would be space used again too early.
                kept = [bytes(4096), old[at : at + 4096]]
                assert found in (kept if at else [*kept, b"\2" * 4096, bytes(4096)]), state
            await root.close()

    run(main())


SECRET = ["--object", "secret,id=key,data=a long password"]
ENCRYPTED = "driver=qcow,encrypt.format=aes,encrypt.key-secret=key,file.filename="


def encrypted(folder: Path, qemu_img: Oracle, qemu_io: Oracle) -> tuple[Path, bytearray]:
    image, model = folder / "image", bytearray(MIB)
    options = ["-o", "encrypt.format=aes,encrypt.key-secret=key"]
    qemu_img("create", "-q", "-f", "qcow", *SECRET, *options, image, str(MIB))
    commands: list[str] = []
    for offset, length, byte in ((0, 70000, 1), (500000, 3000, 2), (MIB - 512, 512, 3)):
        commands += ["-c", f"write -q -P {byte} {offset} {length}"]
        model[offset : offset + length] = bytes([byte]) * length
    qemu_io(*SECRET, "--image-opts", *commands, f"{ENCRYPTED}{image}")
    return image, model


def test_encrypted_images_are_rescued(tmpfs: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    image, model = encrypted(tmpfs, qemu_img, qemu_io)
    raw = tmpfs / "raw"
    source = f"{ENCRYPTED}{image}"
    command = ["img", "convert", *SECRET, "--image-opts", source, "-O", "raw", str(raw)]
    assert main(command) == 0
    assert raw.read_bytes() == model


def test_encrypted_images_without_a_key_or_for_writing(
    tmpfs: Path, qemu_img: Oracle, qemu_io: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    image, _ = encrypted(tmpfs, qemu_img, qemu_io)
    with pytest.raises(BlockError, match="key-secret' is required"):
        blocklayer.open(image, format="qcow")
    assert main(["img", "info", str(image)]) == 0
    assert "encrypted: yes" in capsys.readouterr().out
    command = ["io", *SECRET, "--image-opts", "-c", "write 0 512", f"{ENCRYPTED}{image}"]
    assert main(command) != 0
    assert "can be read only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("offset", "width", "value", "said"),
    [
        (4, "I", 3, "does not support"),
        (24, "Q", 1, "Image size is too small"),
        (24, "Q", 1 << 62, "Image too large"),
        (32, "B", 8, "Cluster size must be between 512 and 64k"),
        (32, "B", 17, "Cluster size must be between 512 and 64k"),
        (33, "B", 5, "L2 table size must be between 512 and 64k"),
        (33, "B", 14, "L2 table size must be between 512 and 64k"),
        (36, "I", 9, "invalid encryption method in qcow header"),
        (40, "Q", 1 << 60, "past the end"),
        (8, "QI", (48, 1024), "Backing file name too long"),
        (8, "QI", (1 << 40, 10), "past the end"),
    ],
)
def test_what_is_refused(
    offset: int, width: str, value: int | tuple[int, int], said: str, tmpfs: Path
) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, MIB, format="qcow")
    data = bytearray(image.read_bytes())
    values = value if isinstance(value, tuple) else (value,)
    struct.pack_into(">" + width, data, offset, *values)
    image.write_bytes(data)
    with pytest.raises(BlockError, match=said):
        blocklayer.open(image, format="qcow")


@pytest.mark.parametrize(
    ("table", "entry"), [("l1", 1 << 40), ("l1", 8), ("l2", 1 << 40), ("l2", 8193), ("l2", 1 << 63)]
)
def test_entries_that_name_nothing_are_errors(table: str, entry: int, tmpfs: Path) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, MIB, format="qcow")
    with blocklayer.open(image, format="qcow", writable=True) as disk:
        disk.write(0, b"x" * 9000)
    data = bytearray(image.read_bytes())
    place = 48 if table == "l1" else struct.unpack_from(">Q", data, 48)[0]
    struct.pack_into(">Q", data, place, entry)
    image.write_bytes(data)
    with blocklayer.open(image, format="qcow", writable=True) as disk:
        for request in (lambda: disk.read(0, 10), lambda: disk.write(0, b"x")):
            with pytest.raises(BlockError):
                request()
    # Space may have been taken at the end, and was not used.
    assert image.read_bytes().startswith(data)


def test_each_request_may_fail_while_it_is_emptied() -> None:
    """What is there is all of the old disk, or what is below it; never another cluster's."""

    async def attempt(nth: int) -> bool:
        disk = await new_disk(Kind("qcow", size=64 * KIB))
        bench = await Bench.open(disk, format="qcow")
        await bench.write(0, 64 * KIB, 1)
        await bench.flush()
        old = bench.model.visible()
        driver = bench.root.node.driver
        assert isinstance(driver, FormatDriver)
        disk.fail(nth)
        try:
            await driver.make_empty()
        except BlockError:
            with pytest.raises(BlockError, match="refused"):
                await bench.root.write(0, b"x")
        failed = bool(disk.failures)
        await bench.root.close()
        disk.fail(0)
        root = await take(disk, format="qcow")
        assert await root.read(0, 64 * KIB) in (old, bytes(64 * KIB))
        await root.close()
        return failed

    async def main() -> None:
        nth = 1
        while await attempt(nth):
            nth += 1
        assert nth > 2

    run(main())
