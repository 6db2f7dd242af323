"""Policies: what an image may open, what opening may cost, and that one holds everywhere."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

import blocklayer
from blocklayer import Policy
from blocklayer.errors import BlockError, PolicyError, UsageError
from cli.runs import ours
from oracles import Oracle
from untrusted.opened import opened


@pytest.fixture
def chain(qemu_img: Oracle, tmp_path: Path) -> Path:
    """``top`` over ``base`` (raw), each in a folder of its own."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "b" / "base").write_bytes(b"base".ljust(1 << 20, b"\0"))
    top = tmp_path / "a" / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "../b/base", "-F", "raw", top)
    return top


def name_backing(qemu_img: Oracle, top: Path, name: str) -> None:
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", name, top)


def may_open(image: Path, policy: Policy) -> bool:
    try:
        with blocklayer.open(image, format="qcow2", policy=policy) as disk:
            assert disk.read(0, 4) == b"base"
        return True
    except PolicyError:
        return False


def test_folders_files_and_links(chain: Path, tmp_path: Path) -> None:
    base = tmp_path / "b" / "base"
    assert may_open(chain, Policy())
    assert may_open(chain, Policy(allow=(str(base),)))
    assert may_open(chain, Policy(allow=(str(base.parent),)))
    assert may_open(chain, Policy.strict(str(base.parent)))
    assert not may_open(chain, Policy.strict())
    assert not may_open(chain, Policy(allow=(str(chain.parent),)))
    assert not may_open(chain, Policy(allow=()))
    link = tmp_path / "link"
    link.symlink_to(base.parent)
    assert may_open(chain, Policy(allow=(str(link),)))
    # A link in an allowed folder leads nowhere else.
    base.rename(tmp_path / "hidden")
    base.symlink_to(tmp_path / "hidden")
    assert not may_open(chain, Policy(allow=(str(base.parent),)))


@pytest.mark.parametrize("shape", ["full", "dotted", "short", "nested"])
def test_names_with_options_are_looked_through(
    qemu_img: Oracle, chain: Path, tmp_path: Path, shape: str
) -> None:
    base = str(tmp_path / "b" / "base")
    file = {"driver": "file", "filename": base}
    options = {
        "full": {"driver": "raw", "file": file},
        "dotted": {"driver": "raw", "file.driver": "file", "file.filename": base},
        "short": {"driver": "raw", "file": {"filename": base}},
        "nested": {"driver": "raw", "file": {"driver": "raw", "file": file}},
    }[shape]
    name_backing(qemu_img, chain, "json:" + json.dumps(options))
    assert may_open(chain, Policy())
    assert not may_open(chain, Policy(allow=(base,))), (
        "plain names only, unless protocols are named"
    )
    assert may_open(chain, Policy(allow=(base,), protocols=("file",)))
    with opened() as seen:
        assert not may_open(chain, Policy(allow=(str(chain.parent),), protocols=("file",)))
    assert base not in seen
    assert not may_open(chain, Policy(protocols=("null-co",)))


def test_protocols_nodes_and_devices(qemu_img: Oracle, chain: Path) -> None:
    null = {"driver": "raw", "file": {"driver": "null-co", "size": 1 << 20, "read-zeroes": True}}
    name_backing(qemu_img, chain, "json:" + json.dumps(null))
    for policy, allowed in (
        (Policy(), True),
        (Policy(protocols=("file",)), False),
        (Policy(protocols=("null-co",)), True),
        (Policy(allow=("/",)), False),
        (Policy(allow=("/",), protocols=("null-co",)), True),
    ):
        if allowed:
            blocklayer.open(chain, policy=policy).close()
        else:
            with pytest.raises(PolicyError):
                blocklayer.open(chain, policy=policy)
    name_backing(qemu_img, chain, "/dev/zero")
    with pytest.raises(PolicyError):
        blocklayer.open(chain, policy=Policy(allow=("/dev",)))
    name_backing(qemu_img, chain, 'json:{"driver": "raw", "file": "some-node"}')
    with pytest.raises(PolicyError, match="names the node"):
        blocklayer.open(chain, policy=Policy(protocols=("file",)))


def test_what_the_user_names_is_the_users_business(chain: Path, tmp_path: Path) -> None:
    base = {"driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / "b" / "base")}}
    image = {"driver": "qcow2", "file": {"filename": str(chain)}, "backing": base}
    with blocklayer.open(image, policy=Policy.strict()) as disk:
        assert disk.read(0, 4) == b"base"


def test_formats_and_sizes(qemu_img: Oracle, chain: Path, tmp_path: Path) -> None:
    assert may_open(chain, Policy(formats=("qcow2", "raw")))
    assert not may_open(chain, Policy(formats=("qcow2",)))
    assert not may_open(chain, Policy(formats=("raw",)))
    assert may_open(chain, Policy(max_size=1 << 20))
    assert not may_open(chain, Policy(max_size=(1 << 20) - 1))
    # Guessing is no way around.
    with pytest.raises(PolicyError):
        blocklayer.open(chain, policy=Policy(formats=("raw",)))


def test_depth_memory_and_time(qemu_img: Oracle, chain: Path, tmp_path: Path) -> None:
    assert may_open(chain, Policy(max_depth=2))
    assert not may_open(chain, Policy(max_depth=1))
    big = tmp_path / "a" / "big.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", big, "1T")
    blocklayer.open(big, policy=Policy(max_memory=16 << 20)).close()
    with pytest.raises(PolicyError, match="more metadata"):
        blocklayer.open(big, policy=Policy(max_memory=1 << 20))
    with pytest.raises(PolicyError, match="longer"):
        blocklayer.open(big, policy=Policy(max_time_s=0.0))
    # Limits are for opening: what is read later is the reader's choice.
    with blocklayer.open(chain, policy=Policy(max_memory=1 << 20)) as disk:
        for _ in range(3):
            assert len(disk.read(0, 1 << 20)) == 1 << 20


def test_no_guessing_anywhere(qemu_img: Oracle, chain: Path) -> None:
    policy = Policy(probing=False)
    assert may_open(chain, policy)
    with pytest.raises(PolicyError):
        blocklayer.open(chain, policy=policy)
    qemu_img("create", "-q", "-u", "-f", "qcow2", chain, "1M")
    data = bytearray(chain.read_bytes())
    data[8:20] = (512).to_bytes(8, "big") + (9).to_bytes(4, "big")
    data[512:521] = b"../b/base"
    chain.write_bytes(data)
    assert may_open(chain, Policy())
    assert not may_open(chain, policy)


def test_one_for_the_whole_process(chain: Path) -> None:
    before = blocklayer.default_policy()
    blocklayer.set_default_policy(Policy.strict())
    try:
        with pytest.raises(PolicyError):
            blocklayer.open(chain, format="qcow2")
        assert may_open(chain, Policy())
    finally:
        blocklayer.set_default_policy(before)
    blocklayer.open(chain).close()


def test_images_opened_side_by_side(chain: Path) -> None:
    async def main() -> None:
        policy = Policy(max_memory=64 << 20, max_time_s=60)
        disks = await asyncio.gather(
            *(blocklayer.aio.Disk.open(chain, policy=policy) for _ in range(4))
        )
        for disk in disks:
            assert disk.graph.budget is None
            await disk.close()

    asyncio.run(main())


def test_the_command_line(chain: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"allow": [str(tmp_path / "b")], "probing": False}))
    line = ["map", "-f", "qcow2", str(chain)]
    assert ours(["img", *line], tmp_path, "blk").code == 0
    assert ours(["img", "--policy", str(policy), *line], tmp_path, "blk").code == 0
    assert ours(["--policy", str(policy), "img", *line], tmp_path, "blk").code == 0
    assert ours(["--policy=strict", "img", *line], tmp_path, "blk").code == 1
    run = ours(["--policy=no-probe", "img", "map", str(chain)], tmp_path, "blk")
    assert (run.code, "name it" in run.err) == (1, True)
    run = ours(["--policy=no-probe", "io", "-c", "read 0 512", str(chain)], tmp_path, "blk")
    assert run.code == 1
    for wrong in ("{", '{"probe": false}', '{"allow": "x"}'):
        policy.write_text(wrong)
        run = ours(["--policy", str(policy), "img", *line], tmp_path, "blk")
        assert run.code == 1
        assert "Could not use the policy" in run.err
    assert ours(["--policy", "missing", "img", *line], tmp_path, "blk").code == 1
    assert ours(["--policy"], tmp_path, "blk").code == 1
    # What one run was given is not left to the next.
    assert ours(["img", *line], tmp_path, "blk").code == 0


def test_info_follows_no_further_than_allowed(
    qemu_img: Oracle, chain: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.json"
    name = json.dumps({"driver": "raw", "file": {"driver": "file", "filename": "/etc/passwd"}})
    name_backing(qemu_img, chain, "json:" + name)
    policy.write_text(json.dumps({"allow": [str(tmp_path)], "protocols": ["file"]}))
    line = ["--policy", str(policy), "info", "--backing-chain", str(chain)]
    with opened() as seen:
        assert ours(line, tmp_path, "qemu-img").code == 1
    assert "/etc/passwd" not in seen


def test_errors_are_ours() -> None:
    assert issubclass(PolicyError, BlockError)
    with pytest.raises((UsageError, BlockError)):
        blocklayer.open("nowhere", policy=Policy.strict())
