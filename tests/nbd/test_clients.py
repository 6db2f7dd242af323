"""Real clients of our server: QEMU's, libnbd's; plain and encrypted."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blocklayer.graph.tls_credentials import server_context
from nbd.certificates import make_certificates
from nbd.serving import image, run, served
from oracles import HANG_TIMEOUT_S, Oracle, miss

SYSTEM_PYTHON = "/usr/bin/python3"


async def aside(
    oracle: Oracle, *arguments: Any, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a tool beside the server."""
    return await asyncio.to_thread(lambda: oracle(*arguments, **options))


async def libnbd(script: str, *arguments: str) -> str:
    """Run a script that uses libnbd's binding, which belongs to the system's Python."""
    probe = subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True, check=False)
    if probe.returncode:
        miss("python3-libnbd is not installed (scripts/oracles installs it)")
    done = await asyncio.to_thread(
        subprocess.run,
        [SYSTEM_PYTHON, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


IO = [
    ("-c", "write -P 1 0 64k"),
    ("-c", "write -P 2 1M 1M"),
    ("-c", "write -f -P 3 12345 777"),
    ("-c", "write -z -u 1088k 64k"),
    ("-c", "write -z 1216k 10k"),
    ("-c", "discard 1536k 128k"),
    ("-c", "flush"),
]


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_qemu_writes_through_us_what_it_writes_by_itself(
    tmp_path: Path, form: str, qemu_img: Oracle, qemu_io: Oracle
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for path in (ours, theirs):
        qemu_img("create", "-q", "-f", form, path, "4M")
    commands = [word for pair in IO for word in pair]
    qemu_io("-f", form, "-d", "unmap", *commands, theirs)

    async def go() -> None:
        async with served(tmp_path, image(ours, form)) as stage:
            await aside(qemu_io, "-f", "raw", *commands, stage.uri)
            await aside(qemu_img, "compare", "-f", "raw", "-F", form, stage.uri, theirs)
            copy = tmp_path / "copy"
            await aside(qemu_img, "convert", "-O", "qcow2", "-f", "raw", stage.uri, copy)
            qemu_img("compare", "-F", form, copy, theirs)

    run(go())
    qemu_img("compare", "-f", form, "-F", form, ours, theirs)
    if form == "qcow2":
        qemu_img("check", ours)


def test_a_map_through_us_is_the_map_through_qemu(
    tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle, qemu_nbd: Oracle, nbdinfo: Oracle
) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "4M")
    qemu_io("-c", "write -P 1 0 1M", "-c", "write -z 3M 64k", base)
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top)
    qemu_io("-c", "write -P 2 64k 64k", "-c", "write -z 512k 64k", "-c", "write 2M 1", top)
    qemu_img("bitmap", "--add", top, "b")
    qemu_io("-c", "write -P 2 128k 64k", "-c", "write 2M 1", top)
    theirs = tmp_path / "theirs.sock"
    contexts = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b")

    async def go() -> list[Any]:
        options = {**image(top), "read-only": True}
        async with served(tmp_path, options, allocation_depth=True, bitmaps=["b"]) as stage:
            shown = await aside(nbdinfo, "--json", stage.uri)
            assert set(json.loads(shown.stdout)["exports"][0]["contexts"]) == set(contexts)
            return [
                json.loads((await aside(nbdinfo, "--json", f"--map={each}", stage.uri)).stdout)
                for each in contexts
            ]

    ours = run(go())
    pid = tmp_path / "pid"
    qemu_nbd(
        *("--fork", "--pid-file", pid, "-t", "-r", "-A", "-B", "b", "-f", "qcow2"),
        *("-k", theirs, top),
    )
    try:
        uri = f"nbd+unix:///?socket={theirs}"
        assert ours == [nbdinfo.json("--json", f"--map={each}", uri) for each in contexts]
    finally:
        subprocess.run(["kill", pid.read_text().strip()], check=True)


def test_what_qemu_lists_of_us(tmp_path: Path, qemu_img: Oracle, qemu_nbd: Oracle) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")

    async def go() -> str:
        async with served(tmp_path, image(path), name="x", description="words") as stage:
            return (await aside(qemu_nbd, "--list", "-k", stage.path)).stdout

    assert run(go()).splitlines() == [
        "exports available: 1",
        " export: 'x'",
        "  description: words",
        "  size:  4194304",
        "  flags: 0x1ded ( flush fua trim zeroes df multi cache fast-zero block-status-payload )",
        "  min block: 1",
        "  opt block: 4096",
        "  max block: 33554432",
        "  transaction size: 64-bit",
        "  available meta contexts: 1",
        "   base:allocation",
    ]


@pytest.mark.parametrize("simple", [True, False])
def test_copies_by_many_connections_at_once(
    tmp_path: Path, simple: bool, qemu_img: Oracle, qemu_io: Oracle, nbdcopy: Oracle
) -> None:
    path, copy = tmp_path / "a.qcow2", tmp_path / "copy"
    qemu_img("create", "-q", "-f", "qcow2", path, "16M")
    qemu_io(*(word for at in range(0, 16, 2) for word in ("-c", f"write -P {at} {at}M 1M")), path)

    async def go() -> None:
        async with served(tmp_path, image(path)) as stage:
            extra = ["--connections=1"] if simple else ["--connections=4", "--requests=64"]
            await aside(nbdcopy, *extra, stage.uri, copy)
            qemu_img("compare", "-U", "-f", "raw", "-F", "qcow2", copy, path)
            await aside(nbdcopy, "--destination-is-zero", *extra, copy, stage.uri)

    run(go())
    qemu_img("compare", "-f", "raw", "-F", "qcow2", copy, path)
    qemu_img("check", path)


def test_libnbd_without_structured_replies(tmp_path: Path, qemu_img: Oracle) -> None:
    script = """
import nbd, sys
h = nbd.NBD()
h.set_request_structured_replies(False)
h.set_strict_mode(0)
h.connect_uri(sys.argv[1])
assert not h.get_structured_replies_negotiated()
h.pwrite(b"hello", 70000)
assert h.pread(8, 69999) == b"\\0hello\\0\\0"
h.trim(65536, 0); h.zero(4096, 70000, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA); h.flush()
h.cache(4096, 0)
assert h.pread(8, 69999) == bytes(8)
for call in (lambda: h.pread(4096, 1 << 20), lambda: h.pwrite(b"x", 1 << 20)):
    try:
        call()
    except nbd.Error as error:
        print(error.errno)
h.shutdown()
"""
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")

    async def go() -> str:
        async with served(tmp_path, image(path)) as stage:
            return await libnbd(script, stage.uri)

    assert run(go()).split() == ["EINVAL", "ENOSPC"]


@pytest.mark.parametrize("admitted", [True, False])
def test_encrypted_for_those_with_a_name(
    tmp_path: Path, admitted: bool, qemu_img: Oracle, qemu_io: Oracle
) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    folder = make_certificates(tmp_path)
    names: list[str] = []

    def authorize(name: str) -> bool:
        names.append(name)
        return admitted

    async def go() -> None:
        options = {"tls": lambda: server_context(str(folder)), "authorize": authorize}
        async with served(tmp_path, image(path), server=options) as stage:
            client = (
                *("--object", f"tls-creds-x509,id=t,endpoint=client,dir={folder}"),
                *("-c", "write -P 7 1M 4M", "-c", "read -P 7 1M 4M", "-c", "flush"),
                "--image-opts",
                f"driver=nbd,path={stage.path},export=disk,tls-creds=t,tls-hostname=localhost",
            )
            done = await aside(qemu_io, *client, check=False)
            assert (done.returncode == 0) == admitted, done.stderr
            assert names == ["O=blocklayer,CN=tester"]
            plain = await aside(qemu_io, "-c", "read 0 1", stage.uri, check=False)
            assert plain.returncode
            assert "TLS" in plain.stderr

    run(go())


def test_fio_finds_what_it_wrote(tmp_path: Path, qemu_img: Oracle) -> None:
    from oracles import require

    fio, path = require("fio"), tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")

    async def go() -> None:
        async with served(tmp_path, image(path)) as stage:
            await aside(
                fio, "--name=x", "--ioengine=nbd", f"--uri={stage.uri}", "--rw=randrw",
                "--bsrange=512-64k", "--iodepth=16", "--size=8M", "--verify=crc32c",
                cwd=tmp_path,
            )  # fmt: skip

    run(go())
    qemu_img("check", path)
