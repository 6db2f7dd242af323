"""The ``luks`` driver beside qemu-img, qemu-io and libluksde: each reads what another wrote."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import blocklayer
from blocklayer.errors import BlockError, FormatError, PolicyError, UsageError
from blocklayer.graph.gate import Policy
from blocklayer.graph.root import Root
from blocklayer.testing.contract import DiskContract
from cli.runs import ours, theirs
from crypto.volumes import FAST, MIB, OBJECTS, SECRETS, create, io, luks, open_disk, qcow2
from drivers.opening import RESIZE
from oracles import Oracle

CIPHERS = [
    {"cipher-alg": f"aes-{bits}", "cipher-mode": mode, "ivgen-alg": ivgen}
    for bits, mode, ivgen in itertools.product(
        (128, 192, 256), ("xts", "cbc"), ("plain", "plain64", "essiv")
    )
]
MADE_BY_QEMU = {"aes-128-cbc-essiv"}
"""It measures for seconds how many iterations it wants, whatever it is told; what it makes when not
told any cipher is read in `test_qcow2`."""
HASHES = ["sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "md5", "sm3"]


def names(options: dict[str, str]) -> str:
    return "-".join(options.values())


def operations(seed: int, size: int, count: int = 12) -> Iterator[tuple[int, int, int]]:
    """(offset, length, byte): odd and even ones, short and long."""
    chance = random.Random(seed)
    for _ in range(count):
        length = chance.choice([1, 511, 512, 4096, 65536, 70001, 1 << 20])
        offset = chance.randrange(size - length)
        if chance.random() < 0.5:
            offset = offset // 512 * 512
        yield offset, length, chance.randrange(256)


def write_ours(options: dict[str, Any], seed: int) -> bytearray:
    with open_disk(options) as disk:
        model = bytearray(disk.read(0, disk.size))
        for offset, length, byte in operations(seed, disk.size):
            disk.write(offset, bytes([byte]) * length)
            model[offset : offset + length] = bytes([byte]) * length
    return model


def write_theirs(qemu_io: Oracle, options: dict[str, Any], seed: int, model: bytearray) -> None:
    commands = []
    for offset, length, byte in operations(seed, len(model)):
        commands.append(f"write -q -P {byte} {offset} {length}")
        model[offset : offset + length] = bytes([byte]) * length
    io(qemu_io, options, *commands)


def read_theirs(qemu_img: Oracle, options: str, out: Path) -> bytes:
    qemu_img("convert", *OBJECTS, "--image-opts", options, "-O", "raw", out)
    return out.read_bytes()


def read_with_libluksde(path: Path, secret: str, size: int) -> bytes:
    pyluksde = pytest.importorskip("pyluksde")
    volume = pyluksde.volume()
    volume.set_password(SECRETS[secret].decode())
    volume.open(str(path))
    try:
        if volume.is_locked():
            volume.unlock()
        assert not volume.is_locked()
        return bytes(volume.read_buffer_at_offset(size, 0))
    finally:
        volume.close()


@pytest.mark.parametrize("cipher", CIPHERS, ids=names)
def test_both_ways(
    cipher: dict[str, str], tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle
) -> None:
    path, out = tmp_path / "a.luks", tmp_path / "out"
    options, size = luks(path), 2 * MIB
    if names(cipher) in MADE_BY_QEMU:
        chosen = ",".join(f"{name}={value}" for name, value in cipher.items())
        made = f"key-secret=one,iter-time={FAST},{chosen}"
        qemu_img("create", "-q", *OBJECTS, "-f", "luks", "-o", made, path, str(size))
    else:
        create(path, size, **cipher)
    model = write_ours(options, 1)
    if (cipher["cipher-alg"], cipher["cipher-mode"]) != ("aes-192", "cbc"):
        # The real tool dies opening those: their key material is no whole sectors.
        write_theirs(qemu_io, options, 2, model)
        text = "driver=luks,key-secret=one,file.filename=" + str(path)
        assert read_theirs(qemu_img, text, out) == model
    with open_disk(options, writable=False) as disk:
        assert disk.read(0, size) == model
    # libluksde knows no AES-192, and essiv with keys of 256 bits in CBC only.
    essiv = {"aes-256-cbc-essiv"} if cipher["ivgen-alg"] == "essiv" else {names(cipher)}
    if cipher["cipher-alg"] != "aes-192" and names(cipher) in essiv:
        assert read_with_libluksde(path, "one", size) == model


@pytest.mark.parametrize("hash_name", HASHES)
def test_hashes(hash_name: str, tmp_path: Path, qemu_io: Oracle) -> None:
    path = tmp_path / "a.luks"
    create(path, MIB, **{"hash-alg": hash_name})
    with open_disk(luks(path)) as disk:
        disk.write(100, bytes([8]) * 5000)
    io(qemu_io, luks(path), "read -P 8 100 5000", "write -P 7 0 512")
    with open_disk(luks(path)) as disk:
        assert disk.read(0, 512) == bytes([7]) * 512


REFUSED = [
    "-f luks b 1M",
    "-f luks -o key-secret=nosuch b 1M",
    "-f luks -o key-secret=one,cipher-alg=foo b 1M",
    "-f luks -o key-secret=one,iter-time=abc b 1M",
    "-f luks -o key-secret=one,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha1 b 1M",
    "-f qcow2 -o encrypt.format=luks b 1M",
    "-f qcow2 -o encrypt.key-secret=one b 1M",
    "-f qcow2 -o encrypt.format=luks,encrypt.key-secret=nosuch b 1M",
]


@pytest.mark.parametrize("line", REFUSED)
def test_same_refusals(line: str, tmp_path: Path, qemu_img: Oracle) -> None:
    arguments = ["create", "-q", *OBJECTS, *line.split()]
    mine = ours(arguments, tmp_path)
    (tmp_path / "b").unlink(missing_ok=True)
    assert mine == theirs(qemu_img, arguments, tmp_path)


OPENINGS = [
    "map a.luks",
    "convert a.luks out",
    "resize a.luks 2M",
    "map --image-opts driver=luks,key-secret=nosuch,file.filename=a.luks",
    "map --image-opts driver=luks,key-secret=no,file.filename=a.luks",
    "map --output=json --image-opts driver=luks,key-secret=one,file.filename=a.luks",
    "info a.luks",
    "info --output=json a.luks",
    "info essiv.luks",
    "measure -O luks -o key-secret=one --size 10M",
    "measure -O qcow2 -o encrypt.format=luks,encrypt.key-secret=one --size 10M",
]


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of volumes that no line of OPENINGS changes."""
    folder = tmp_path_factory.mktemp("volumes")
    create(folder / "a.luks", MIB)
    create(folder / "essiv.luks", MIB, **{"cipher-mode": "cbc", "ivgen-alg": "essiv"})
    return folder


@pytest.mark.parametrize("line", OPENINGS)
def test_same_words(line: str, volumes: Path, qemu_img: Oracle) -> None:
    command, *rest = line.split()
    arguments = [command, *OBJECTS, *rest]
    before = (volumes / "a.luks").read_bytes()
    mine = ours(arguments, volumes)
    their = theirs(qemu_img, arguments, volumes)
    assert mine == their
    assert (volumes / "a.luks").read_bytes() == before


def test_detached_header(tmp_path: Path) -> None:
    header, data = tmp_path / "header", tmp_path / "data"
    create(header, None, **{"detached-header": "on"})  # type: ignore[arg-type]
    data.write_bytes(random.Random(5).randbytes(MIB))
    options = luks(data, header={"driver": "file", "filename": str(header)})
    with open_disk(options) as disk:
        assert disk.size == MIB
        disk.write(1000, b"hello")
        disk.resize(2 * MIB)
    with open_disk(options, writable=False) as disk:
        assert disk.size == 2 * MIB
        assert disk.read(1000, 5) == b"hello"
        assert disk.aio.root.node.driver.specific_info().detached_header
    with pytest.raises(FormatError, match="detached"):
        open_disk(luks(header))
    assert header.read_bytes()[:6] == b"LUKS\xba\xbe"


def test_detached_header_of_the_real_tool(tmp_path: Path, qemu_io: Oracle) -> None:
    header, data = tmp_path / "header", tmp_path / "data"
    create(header, None, **{"detached-header": "on"})  # type: ignore[arg-type]
    data.write_bytes(bytes(MIB))
    options = luks(data, header={"driver": "file", "filename": str(header)})
    io(qemu_io, options, "write -P 9 4000 10000")
    with open_disk(options) as disk:
        assert disk.read(4000, 10000) == bytes([9]) * 10000
        disk.write(5000, b"ours")
    io(qemu_io, options, "read -P 9 4000 1000", "read -P 111 5000 1")


def test_resizing(tmp_path: Path, qemu_img: Oracle) -> None:
    path = tmp_path / "a.luks"
    create(path, MIB)
    with open_disk(luks(path)) as disk:
        disk.write(0, b"x" * MIB)
        disk.resize(3 * MIB)
        assert disk.size == 3 * MIB
        assert disk.read(0, MIB) == b"x" * MIB
        disk.resize(MIB // 2, shrink=True)
        with pytest.raises(UsageError):
            disk.resize(1000)
    info = qemu_img.json("info", "--output=json", path)
    assert info["virtual-size"] == MIB // 2


def test_an_image_inside_grows_over_zeros(
    tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle
) -> None:
    """qcow2 counts on zeros past the end of its file; in a LUKS volume there are none."""
    path = tmp_path / "a.luks"
    create(path, 0)
    inner = {"driver": "qcow2", "file": luks(path)}
    with open_disk(luks(path)) as disk:
        blocklayer.create(tmp_path / "inner", 4 * MIB)
        data = (tmp_path / "inner").read_bytes()
        disk.resize(len(data) + -len(data) % 512)
        disk.write(0, data)
    model = write_ours(inner, 6)
    with open_disk(inner) as disk:
        assert disk.read(0, disk.size) == model
    write_theirs(qemu_io, inner, 7, model)
    with open_disk(inner) as disk:
        assert disk.read(0, disk.size) == model


def test_convert_writes_zeros_too(tmp_path: Path, qemu_img: Oracle) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(MIB) + b"x" * 5000 + bytes(MIB))
    objects = ["--object", "secret,id=one,data=" + SECRETS["one"].decode()]
    for format, name in (("luks", ""), ("qcow2", "encrypt.")):
        options = f"{name}key-secret=one,{name}iter-time=1"
        options += ",encrypt.format=luks" if name else ""
        line = ["convert", *objects, "-f", "raw", "-O", format, "-o", options, "source", "target"]
        assert ours(line, tmp_path) == (0, "", "")
        whole = source.read_bytes() + bytes(-source.stat().st_size % 512)
        text = f"driver={format},{name}key-secret=one,file.filename={tmp_path / 'target'}"
        assert read_theirs(qemu_img, text, tmp_path / "out") == whole
        back = ["convert", *objects, "--image-opts", text, "-O", "raw", "back"]
        assert ours(back, tmp_path) == (0, "", "")
        assert (tmp_path / "back").read_bytes() == whole


def test_too_many_iterations_are_not_spent(tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    create(path)
    with path.open("r+b") as file:
        file.seek(208 + 4)
        file.write(struct.pack(">I", 0xFFFFFFFF))
    with pytest.raises(PolicyError, match="4294967295 iterations"):
        open_disk(luks(path))
    create(path)
    with pytest.raises(PolicyError, match="the policy allows 10"):
        open_disk(luks(path), policy=Policy(max_key_iterations=10))
    assert ours(["info", str(path)], tmp_path).code == 0


@pytest.mark.parametrize("length", [0, 7, 591, 600, 5000, 300000])
def test_cut_files(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    create(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BlockError):
        open_disk(luks(path))


def test_a_payload_past_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    create(path)
    with path.open("r+b") as file:
        file.seek(104)
        file.write(struct.pack(">I", 0xFFFFFFFF))
    with pytest.raises(FormatError, match="past the file's end"):
        open_disk(luks(path))


class LuksTarget:
    """A volume that was filled with zeros, as the contract wants new disks to be."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._header = b""

    async def create(self, size: int) -> None:
        if not self._header:
            await blocklayer.aio.create(
                self._path, 0, format="luks", secrets=SECRETS,
                **{"key-secret": "one", "iter-time": FAST, "cipher-alg": "aes-128"},
            )  # fmt: skip
            self._header = self._path.read_bytes()
        self._path.write_bytes(self._header + bytes(size))
        root = await self.open()
        await root.write_zeroes(0, size)
        await root.close()

    async def open(self, *, writable: bool = True) -> Root:
        disk = await blocklayer.aio.Disk.open(
            luks(self._path), writable=writable, secrets=SECRETS, force_share=False
        )
        assert not writable or disk.root.taken == RESIZE
        return disk.root


class TestLuks(DiskContract):
    granularity = 512

    @pytest.fixture
    def target(self, tmpfs: Path) -> LuksTarget:
        return LuksTarget(tmpfs / "disk")


def test_luks_over_encrypted_qcow2_knows_no_bounds(tmp_path: Path) -> None:
    """Names of nodes open what they describe."""
    path = tmp_path / "a.luks"
    create(path)
    with open_disk(luks(path)) as disk:
        name = disk.aio.root.node.filename
        disk.write(0, b"named")
    assert name.startswith("json:{")
    with blocklayer.open(name, secrets=SECRETS) as disk:
        assert disk.read(0, 5) == b"named"
    from crypto.volumes import create_qcow2

    create_qcow2(tmp_path / "b")
    with open_disk(qcow2(tmp_path / "b")) as disk:
        name = disk.aio.root.node.filename
    with blocklayer.open(name, secrets=SECRETS) as disk:
        assert disk.format == "qcow2"
