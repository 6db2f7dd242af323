"""The nbd driver against real servers, servers that go away, and servers that talk nonsense."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blocklayer
from blocklayer import aio
from blocklayer.codec.nbd.constants import OPTION_MAGIC
from blocklayer.drivers import REGISTRY
from blocklayer.drivers.nbd import names
from blocklayer.errors import BlockError, ProtocolError, StorageError, UnsupportedError, UsageError
from blocklayer.graph.graph import Graph
from certificates import make_certificates
from drivers.nbd_servers import QemuNbd, proxy, qemu_nbd, uri
from effort import examples
from oracles import HANG_TIMEOUT_S, Oracle

MIB = 1 << 20
SIZE = 8 * MIB

pytestmark = pytest.mark.oracle("qemu-nbd")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    chance = random.Random(1)
    path.write_bytes(b"".join(chance.randbytes(MIB) if n % 2 else bytes(MIB) for n in range(8)))
    return path


def requests(disk: blocklayer.Disk, model: bytearray, seed: int, count: int) -> None:
    """Random requests, checked against `model`."""
    chance = random.Random(seed)
    for _ in range(count):
        length = chance.choice((1, 511, 512, 4096, 70_000, 3 * MIB))
        offset = chance.randrange(0, len(model) - length)
        match chance.randrange(5):
            case 0 | 1:
                data = chance.randbytes(length)
                disk.write(offset, data)
                model[offset : offset + length] = data
            case 2:
                disk.write_zeroes(offset, length, unmap=chance.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            case 3:
                assert disk.read(offset, length) == model[offset : offset + length]
            case 4:
                disk.flush()
    assert disk.read(0, len(model)) == model


@pytest.mark.parametrize("arguments", [(), ("--offset", "4096"), ("--cache", "none")])
def test_any_requests(tmp_path: Path, image: Path, arguments: tuple[str, ...]) -> None:
    skipped = 4096 if "--offset" in arguments else 0
    with qemu_nbd(tmp_path, image, *arguments) as server:
        with blocklayer.open(uri(server), format="raw", writable=True) as disk:
            model = bytearray(image.read_bytes()[skipped:])
            assert disk.size == len(model)
            requests(disk, model, 3, 60)
        assert image.read_bytes()[skipped:] == model


def test_many_at_once(tmp_path: Path, image: Path) -> None:
    async def main() -> None:
        name = {"driver": "raw", "file": {**names.parse(uri(server)), "driver": "nbd"}}
        name["file"]["connections"] = 3
        async with await aio.Disk.open(name, writable=True) as disk:
            model = image.read_bytes()
            places = [n * 4096 for n in range(SIZE // 4096)]
            found = await asyncio.gather(*(disk.read(place, 4096) for place in places))
            assert b"".join(found) == model
            await asyncio.gather(*(disk.write(place, b"x" * 4096) for place in places))
            await disk.flush()

    with qemu_nbd(tmp_path, image) as server:
        asyncio.run(main())
    assert image.read_bytes() == b"x" * SIZE


def test_holes_are_seen(tmp_path: Path, image: Path, qemu_img: Oracle) -> None:
    (tmp_path / "sparse.raw").touch()
    qemu_img("convert", "-O", "raw", image, tmp_path / "sparse.raw")
    with qemu_nbd(tmp_path, tmp_path / "sparse.raw") as server:
        ours = [
            (extent.start, extent.length, extent.zero)
            for extent in blocklayer.open(uri(server), format="raw").map()
        ]
        theirs = qemu_img.json("map", "--output=json", "-f", "raw", uri(server))
    assert ours == [(each["start"], each["length"], each["zero"]) for each in theirs]
    assert any(zero for _, _, zero in ours)


def test_a_base_image_and_a_target(tmp_path: Path, image: Path, qemu_img: Oracle) -> None:
    overlay = tmp_path / "top.qcow2"
    with qemu_nbd(tmp_path, image) as server:
        blocklayer.create(overlay, backing=uri(server), backing_format="raw")
        with blocklayer.open(overlay, writable=True) as disk:
            disk.write(MIB, b"new")
            assert (
                disk.read(MIB - 3, 9) == bytes(3) + b"new" + image.read_bytes()[MIB + 3 : MIB + 6]
            )
        assert "identical" in qemu_img("compare", overlay, overlay).stdout
        told = qemu_img.json("info", "--output=json", overlay)
        assert told["backing-filename"] == uri(server)
        target = tmp_path / "target.raw"
        target.write_bytes(bytes(SIZE))
        with qemu_nbd(tmp_path, target) as other:
            blocklayer.convert(overlay, uri(other), format="raw")
        content = image.read_bytes()
        assert target.read_bytes() == content[:MIB] + b"new" + content[MIB + 3 :]


def test_what_an_export_cannot_do(tmp_path: Path, image: Path) -> None:
    with qemu_nbd(tmp_path, image, "--read-only") as server:
        with pytest.raises(StorageError, match="read-only"):
            blocklayer.open(uri(server), format="raw", writable=True)
        with pytest.raises(StorageError, match="not available"):
            blocklayer.open(uri(server, "nope"), format="raw")
    with (
        qemu_nbd(tmp_path, image) as server,
        blocklayer.open(uri(server), format="raw", writable=True) as disk,
        pytest.raises(UnsupportedError, match="Cannot resize"),
    ):
        disk.resize(2 * SIZE)
    with pytest.raises(StorageError, match="Could not open 'nbd"):
        blocklayer.open(uri(server), format="raw")


def test_a_server_that_comes_back(tmp_path: Path, image: Path) -> None:
    async def main(delay: int) -> None:
        name = {**names.parse(uri(server)), "driver": "nbd", "reconnect-delay": delay}
        async with await aio.Disk.open({"driver": "raw", "file": name}, writable=True) as disk:
            await disk.write(0, b"one")
            await disk.flush()
            await disk.write(0, b"two")
            server.stop(signal.SIGKILL)
            if not delay:
                with pytest.raises(StorageError):
                    await disk.read(0, 3)
                return
            reading = asyncio.ensure_future(disk.read(0, 3))
            await asyncio.sleep(0)
            await asyncio.to_thread(server.start)
            assert await reading == b"two"
            with pytest.raises(StorageError, match="may be lost"):
                await disk.flush()
            await disk.write(0, b"three")
            await disk.flush()

    for delay in (0, 30):
        server = QemuNbd(tmp_path, image)
        server.start()
        try:
            asyncio.run(main(delay))
        finally:
            server.stop()
    assert image.read_bytes()[:5] == b"three"


@given(st.integers(0, 700))
@settings(max_examples=examples(12))
def test_cut_off_at_any_byte(tmp_path_factory: pytest.TempPathFactory, limit: int) -> None:
    async def main() -> None:
        async with proxy(folder / "p", server.socket, limit), asyncio.timeout(HANG_TIMEOUT_S):
            try:
                disk = await aio.Disk.open(f"nbd+unix:///?socket={folder / 'p'}", format="raw")
            except BlockError:
                return
            try:
                async with disk:
                    for number in range(20):
                        found = await disk.read(number * 512, 100)
                        assert found == content[number * 512 : number * 512 + 100]
            except BlockError:
                return

    folder = tmp_path_factory.mktemp("cut")
    image = folder / "i"
    content = random.Random(2).randbytes(64 * 1024)
    image.write_bytes(content)
    with qemu_nbd(folder, image) as server:
        asyncio.run(main())


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n" * 20,
        b"NBDMAGIC" + bytes(200),
        b"NBDMAGIC" + OPTION_MAGIC.to_bytes(8, "big") + b"\0\3" + b"\xff" * 500,
    ],
)
def test_nonsense(tmp_path: Path, said: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        writer.write_eof()
        await reader.read()
        writer.close()
        gone.set()

    async def main() -> None:
        listener = await asyncio.start_unix_server(serve, str(tmp_path / "s"))
        async with asyncio.timeout(HANG_TIMEOUT_S):
            with pytest.raises((StorageError, ProtocolError)):
                await aio.Disk.open(f"nbd+unix:///?socket={tmp_path / 's'}", format="raw")
            await gone.wait()
        listener.close()

    gone = asyncio.Event()
    asyncio.run(main())


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="Could not open 'nbd"):
        blocklayer.open(f"nbd+unix:///?socket={tmp_path / 's'}", format="raw")


def test_tls(tmp_path: Path, image: Path, qemu_img: Oracle) -> None:
    folder = make_certificates(tmp_path / "certificates")
    credentials = f"tls-creds-x509,id=tls0,dir={folder},endpoint="
    server = QemuNbd(tmp_path, image, "--object", credentials + "server", "--tls-creds", "tls0")
    server.start()
    try:
        graph = Graph(REGISTRY)
        for name, endpoint in (("tls0", "client"), ("wrong", "server")):
            graph.objects.add("tls-creds-x509", name, {"dir": str(folder), "endpoint": endpoint})

        async def main() -> None:
            file = {**names.parse(uri(server)), "driver": "nbd"}
            with pytest.raises(StorageError, match="TLS"):
                await aio.Disk.open({"driver": "raw", "file": file}, graph=graph)
            for wrong in ({"tls-creds": "wrong"}, {"tls-creds": "none"}, {"tls-hostname": "x"}):
                with pytest.raises(UsageError):
                    await aio.Disk.open({"driver": "raw", "file": {**file, **wrong}}, graph=graph)
            file["tls-creds"] = "tls0"
            other = {**file, "tls-hostname": "elsewhere"}
            with pytest.raises(StorageError, match="TLS failed: Hostname mismatch"):
                await aio.Disk.open({"driver": "raw", "file": other}, graph=graph)
            file["tls-hostname"] = "localhost"
            options = {"driver": "raw", "file": file}
            async with await aio.Disk.open(options, writable=True, graph=graph) as disk:
                assert await disk.read(0, SIZE) == image.read_bytes()
                await disk.write(5, b"secret" * 100_000)
                await disk.flush()

        asyncio.run(main())
        assert image.read_bytes()[5:11] == b"secret"
    finally:
        server.stop()


NAMES = {
    "nbd://host/exp": "nbd://host:10809/exp",
    "nbd://host:1234": "nbd://host:1234",
    "nbd://[::1]:1/a%20b": "nbd://[::1]:1/a%20b",
    "nbd+unix:///?socket=/s": "nbd+unix://?socket=/s",
    "nbd+unix:///e?socket=/s": "nbd+unix:///e?socket=/s",
    "nbd:h:1": "nbd://h:1",
    "nbd:h:1:exportname=x": "nbd://h:1/x",
    "nbd:unix:/s:exportname=x": "nbd+unix:///x?socket=/s",
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    options = names.parse(name)
    server = options["server"]
    kind = names.UnixSocket if server["type"] == "unix" else names.InetSocket
    made = kind(**{key: value for key, value in server.items() if key != "type"})
    assert names.describe(made, options.get("export")) == NAMES[name]


@pytest.mark.parametrize(
    "name",
    [
        "nbd://h:x/",
        "nbd+unix:///e",
        "nbd+unix://h/e?socket=/s",
        "nbd:h",
        "nbd://h/e?x=1",
        "nbds://h",
    ],
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError):
        names.parse(name)
