"""Encrypted qcow2 images: beside the real tools, over backing files, and against a model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blocklayer
from blocklayer.errors import BlockError, UnsupportedError, UsageError
from cli.runs import ours, theirs
from crypto.test_luks import read_theirs, write_ours, write_theirs
from crypto.volumes import FAST, MIB, OBJECTS, create_qcow2, io, open_disk, qcow2
from effort import examples
from oracles import Oracle

SHAPES = [
    {},
    {"cluster_size": "512", "encrypt.cipher-alg": "aes-128"},
    {"cluster_size": "2M", "encrypt.cipher-mode": "cbc", "encrypt.ivgen-alg": "essiv"},
    {"compat": "0.10"},
    {"preallocation": "metadata"},
    {"preallocation": "full", "encrypt.cipher-alg": "aes-192"},
    {"compression_type": "zstd", "refcount_bits": 64},
    {"extended_l2": "on"},
    {"extended_l2": "on", "preallocation": "metadata", "cluster_size": "16k"},
]


def text_of(path: Path, secret: str = "one") -> str:
    return f"driver=qcow2,encrypt.key-secret={secret},file.filename={path}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ways(
    shape: dict[str, str], tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle
) -> None:
    path = tmp_path / "a.qcow2"
    create_qcow2(path, 4 * MIB, **shape)
    with open_disk(qcow2(path)) as disk:
        assert disk.read(0, 4 * MIB) == bytes(4 * MIB)
    assert read_theirs(qemu_img, text_of(path), tmp_path / "out") == bytes(4 * MIB)
    model = write_ours(qcow2(path), 1)
    write_theirs(qemu_io, qcow2(path), 2, model)
    with open_disk(qcow2(path)) as disk:
        disk.write_zeroes(MIB, 700000)
        model[MIB : MIB + 700000] = bytes(700000)
        disk.resize(5 * MIB)
        model += bytes(MIB)
        assert disk.read(0, 5 * MIB) == model
    assert read_theirs(qemu_img, text_of(path), tmp_path / "out") == model
    checked = qemu_img.json("check", *OBJECTS, "--output=json", "--image-opts", text_of(path))
    assert (checked.get("leaks", 0), checked.get("corruptions", 0)) == (0, 0)
    assert ours(["check", str(path)], tmp_path).code == 0


def test_what_the_real_tool_made(tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    path = tmp_path / "a.qcow2"
    made = f"encrypt.format=luks,encrypt.key-secret=one,encrypt.iter-time={FAST}"
    qemu_img("create", "-q", *OBJECTS, "-f", "qcow2", "-o", made, path, "4M")
    model = bytearray(4 * MIB)
    write_theirs(qemu_io, qcow2(path), 3, model)
    with open_disk(qcow2(path)) as disk:
        assert disk.read(0, 4 * MIB) == model
    for line in (["info"], ["info", "--output=json"]):
        assert ours([*line, "a.qcow2"], tmp_path) == theirs(qemu_img, [*line, "a.qcow2"], tmp_path)
    (tmp_path / "b").mkdir()
    create_qcow2(tmp_path / "b" / "a.qcow2", 4 * MIB)
    assert (tmp_path / "b" / "a.qcow2").read_bytes()[:65536] == _fresh(path)


def _fresh(path: Path) -> bytes:
    return path.read_bytes()[:65536]


def test_clusters_that_are_compressed_are_read_and_never_written(
    tmp_path: Path, qemu_io: Oracle
) -> None:
    path = tmp_path / "a.qcow2"
    create_qcow2(path)
    io(qemu_io, qcow2(path), "write -c -P 8 64k 64k", "write -P 9 0 64k")
    with open_disk(qcow2(path)) as disk:
        assert disk.read(0, 192 << 10) == b"\x09" * 65536 + b"\x08" * 65536 + bytes(65536)
        root = disk.aio.root
        with pytest.raises(UnsupportedError, match="Compression and encryption"):
            blocklayer.api.sync.run(root.write_compressed(128 << 10, bytes(65536)))
        disk.write(65536 + 5, b"copied")
    io(qemu_io, qcow2(path), "read -P 8 64k 5", "read -P 8 65547 65525", "read -P 99 65541 1")


def test_nothing_is_stored_in_clear(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create_qcow2(path)
    needle = random.Random(1).randbytes(64)
    with open_disk(qcow2(path)) as disk:
        disk.write(3, needle)
        disk.write(MIB, needle * 4096)
        disk.write(MIB + 77, needle)
    (tmp_path / "raw").write_bytes(needle * 32768)
    options = "encrypt.format=luks,encrypt.key-secret=one,encrypt.iter-time=1"
    line = ["convert", *OBJECTS, "-f", "raw", "-O", "qcow2", "-o", options, "raw", "b.qcow2"]
    assert ours(line, tmp_path) == (0, "", "")
    for image in (path, tmp_path / "b.qcow2"):
        assert needle[:16] not in image.read_bytes()
    assert ours([*line[:1], "-c", *line[1:]], tmp_path).err == (
        "qemu-img: Compression and encryption not supported at the same time\n"
    )


@settings(max_examples=examples(6))
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "zero", "discard", "snapshot", "flush"]),
            st.integers(0, 200_000),
            st.integers(1, 90_000),
            st.integers(1, 255),
        ),
        max_size=12,
    )
)
def test_model_over_an_encrypted_backing_file(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[str, int, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("model")
    size = 256 << 10
    create_qcow2(folder / "base", size, "two", cluster_size="4k")
    with open_disk(qcow2(folder / "base", "two")) as base:
        base.write(0, b"below" * (size // 5))
        model = bytearray(base.read(0, size))
    create_qcow2(folder / "top", size, backing="base", backing_format="qcow2", cluster_size="8k")
    options = qcow2(folder / "top", backing=qcow2(folder / "base", "two"))
    for kind, offset, length, byte in requests:
        length = min(length, size - offset)
        with open_disk(options) as disk:
            if kind == "write":
                disk.write(offset, bytes([byte]) * length)
                model[offset : offset + length] = bytes([byte]) * length
            elif kind == "zero":
                disk.write_zeroes(offset, length, unmap=byte % 2 == 0)
                model[offset : offset + length] = bytes(length)
            elif kind == "discard":
                start, end = -(-offset // 8192) * 8192, (offset + length) // 8192 * 8192
                disk.discard(offset, length)
                if end > start:
                    model[start:end] = bytes(end - start)
            elif kind == "snapshot":
                disk.create_snapshot(f"s{byte}")
            else:
                disk.flush()
            assert disk.read(0, size) == model
    assert ours(["check", str(folder / "top")], folder).code == 0


def test_without_the_key(tmp_path: Path, qemu_img: Oracle) -> None:
    path = tmp_path / "a.qcow2"
    create_qcow2(path)
    for line in (
        "map a.qcow2",
        "convert a.qcow2 out",
        "resize a.qcow2 9M",
        "compare a.qcow2 a.qcow2",
    ):
        assert ours(line, tmp_path) == theirs(qemu_img, line, tmp_path)
    for line in ("info a.qcow2", "check a.qcow2", "snapshot -l a.qcow2", "check -r all a.qcow2"):
        assert ours(line, tmp_path).code == 0
    with (
        blocklayer.open(str(path), metadata_only=True) as disk,
        pytest.raises(UsageError, match=r"encrypt.key-secret"),
    ):
        disk.aio.root.node.driver.encryption.prepare(None)
    plain = tmp_path / "plain"
    blocklayer.create(plain, MIB)
    for given_options, message in (
        ({"encrypt": {"format": "luks", "key-secret": "one"}}, "No encryption in image header"),
        ({"encrypt": {"nope": 1}}, "nope"),
    ):
        with pytest.raises(BlockError, match=message):
            open_disk({**qcow2(plain, None), **given_options})
    with pytest.raises(UsageError, match="Header reported 'luks'"):
        open_disk(qcow2(path, None, encrypt={"format": "aes", "key-secret": "one"}))
    with pytest.raises(UsageError, match="Invalid password"):
        open_disk(qcow2(path, "no"))


def test_the_old_encryption_is_read(tmp_path: Path, qemu_img: Oracle) -> None:
    path, raw = tmp_path / "a.qcow2", tmp_path / "raw"
    data = random.Random(9).randbytes(300_000).ljust(MIB, b"\0")
    raw.write_bytes(data)
    for secret in ("one", "two"):
        made = f"encrypt.format=aes,encrypt.key-secret={secret}"
        qemu_img("convert", *OBJECTS, "-O", "qcow2", "-o", made, raw, path)
        with open_disk(qcow2(path, secret), writable=False) as disk:
            assert disk.read(0, MIB) == data
        with pytest.raises(UnsupportedError, match="can be read only"):
            open_disk(qcow2(path, secret))
        assert ours("info a.qcow2", tmp_path) == theirs(qemu_img, "info a.qcow2", tmp_path)
    with pytest.raises(UnsupportedError, match="can only be read"):
        create_qcow2(tmp_path / "b", **{"encrypt.format": "aes"})


def test_cipher_text_is_no_raw_image(tmp_path: Path) -> None:
    raw = {"data_file": str(tmp_path / "data"), "data_file_raw": True}
    with pytest.raises(UsageError, match="holds cipher text"):
        create_qcow2(tmp_path / "a", **raw)
    assert not (tmp_path / "data").exists()


def test_a_foreign_raw_data_file_with_cipher_text(
    tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle
) -> None:
    """The real tool makes such images; its zeros are in the tables, and so are ours."""
    path = tmp_path / "a.qcow2"
    made = f"encrypt.format=luks,encrypt.key-secret=one,encrypt.iter-time={FAST},extended_l2=on"
    made += f",data_file={tmp_path}/data,data_file_raw=on"
    qemu_img("create", "-q", *OBJECTS, "-f", "qcow2", "-o", made, path, "4M")
    model = bytearray(4 * MIB)
    write_theirs(qemu_io, qcow2(path), 3, model)
    with open_disk(qcow2(path)) as disk:
        assert disk.read(0, 4 * MIB) == model
        disk.write_zeroes(1000, MIB, unmap=True)
        model[1000 : 1000 + MIB] = bytes(MIB)
        disk.write(2 * MIB + 7, b"ours")
        model[2 * MIB + 7 : 2 * MIB + 11] = b"ours"
        disk.resize(5 * MIB)
        model += bytes(MIB)
    assert read_theirs(qemu_img, text_of(path), tmp_path / "out") == model
    assert ours(["check", str(path)], tmp_path).code == 0


def test_snapshots_commit_and_rebase(tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    create_qcow2(base, 2 * MIB, "two")
    with open_disk(qcow2(base, "two")) as disk:
        disk.write(0, b"B" * MIB)
        disk.create_snapshot("before")
        disk.write(1000, b"C" * 1000)
        disk.apply_snapshot("before")
        assert disk.read(0, MIB) == b"B" * MIB
    create_qcow2(top, 2 * MIB, backing="base", backing_format="qcow2")
    options = qcow2(top, backing=qcow2(base, "two"))
    with open_disk(options) as disk:
        disk.write(500, b"T" * 70000)
    expected = b"B" * 500 + b"T" * 70000 + b"B" * (MIB - 70500) + bytes(MIB)
    text = f"{text_of(top)},backing.driver=qcow2,backing.encrypt.key-secret=two,"
    text += f"backing.file.filename={base}"
    assert read_theirs(qemu_img, text, tmp_path / "out") == expected
    assert ours(["commit", *OBJECTS, "-d", "--image-opts", text], tmp_path).err == ""
    assert read_theirs(qemu_img, text_of(base, "two"), tmp_path / "out") == expected
    assert ours(["rebase", *OBJECTS, "-b", "", "--image-opts", text], tmp_path).err == ""
    assert read_theirs(qemu_img, text_of(top), tmp_path / "out") == expected
    with open_disk(qcow2(top), writable=False) as disk:
        assert disk.read(0, 2 * MIB) == expected


def test_amending_other_things(tmp_path: Path, qemu_img: Oracle) -> None:
    path = tmp_path / "a.qcow2"
    create_qcow2(path)
    model = write_ours(qcow2(path), 4)
    with open_disk(qcow2(path)) as disk:
        disk.write_zeroes(0, MIB)
        model[:MIB] = bytes(MIB)
    for change in ("refcount_bits=64", "refcount_bits=16", "compat=0.10", "size=5M", "compat=1.1"):
        line = ["amend", *OBJECTS, "-o", change, "--image-opts", text_of(path)]
        assert ours(line, tmp_path) == (0, "", "")
        qemu_img("check", *OBJECTS, "--image-opts", text_of(path))
    found = read_theirs(qemu_img, text_of(path), tmp_path / "out")
    assert found == model + bytes(MIB)
