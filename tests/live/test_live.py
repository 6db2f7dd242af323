"""`blk live` end to end: each verb on a running daemon's disk, with a guest over NBD."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from live.daemons import OURS, THEIRS, Daemon, disk_arguments, live, running
from oracles import HANG_TIMEOUT_S, Oracle, require

SIZE = "8M"


@pytest.fixture(params=[THEIRS, OURS])
def daemon(request: pytest.FixtureRequest, tmp_path: Path, qemu_img: Oracle) -> Iterator[Daemon]:
    """A daemon with vda, a chain of base, middle, top; and vdb, one image."""
    require("qemu-io")
    names = ("base", "middle", "top")
    for index, name in enumerate(names):
        below = (
            [] if index == 0 else ["-b", str(tmp_path / f"{names[index - 1]}.qcow2"), "-F", "qcow2"]
        )
        qemu_img("create", "-q", "-f", "qcow2", *below, tmp_path / f"{name}.qcow2", SIZE)
        require("qemu-io")("-c", f"write -P {index + 1} {index}M 1M", tmp_path / f"{name}.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "vdb.qcow2", SIZE)
    chain = [("middle", tmp_path / "middle.qcow2"), ("base", tmp_path / "base.qcow2")]
    with running(
        request.param,
        tmp_path,
        *disk_arguments("vda", tmp_path / "top.qcow2", chain),
        *disk_arguments("vdb", tmp_path / "vdb.qcow2"),
    ) as started:
        yield started


only_ours = pytest.mark.parametrize("daemon", [OURS], indirect=True)
"""For what the real daemon has no part in, so that it need not be started again."""


def chain(daemon: Daemon, disk: str) -> list[str]:
    listed = daemon.result("domblklist")
    return next(
        [Path(y["filename"]).name for y in x["layers"]] for x in listed if x["disk"] == disk
    )


def whole(daemon: Daemon) -> None:
    """The guest reads what the three layers held."""
    for index in range(3):
        daemon.reads("vda", index + 1, f"{index}M", "1M")


def test_listings(daemon: Daemon) -> None:
    assert chain(daemon, "vda") == ["top.qcow2", "middle.qcow2", "base.qcow2"]
    table = daemon.live("domblklist").splitlines()
    assert table[0].split() == ["Target", "Source"]
    assert [line.split()[0] for line in table[2:]] == ["vda", "vdb"]
    assert "qcow2" in daemon.live("domblklist", "--details")
    info = daemon.result("domblkinfo", "vda")
    assert info["capacity"] == 8 << 20
    assert info["physical"] >= info["allocation"] >= 1 << 20
    assert "8 MiB" in daemon.live("domblkinfo", "--all", "--human")
    assert "flush_operations" in daemon.result("domblkstat", "vda")


def test_snapshot_of_two_disks(daemon: Daemon, tmp_path: Path, qemu_img: Oracle) -> None:
    daemon.io("vdb", "write -P 9 0 1M")
    made = daemon.result("snapshot-create-as", "monday", "--disk-only", "--atomic")
    assert [Path(disk["file"]).name for disk in made["disks"]] == ["top.monday", "vdb.monday"]
    daemon.io("vda", "write -P 7 0 1M")
    assert chain(daemon, "vda") == ["top.monday", "top.qcow2", "middle.qcow2", "base.qcow2"]
    daemon.reads("vda", 7, "0", "1M")
    daemon.reads("vdb", 9, "0", "1M")
    for file in ("top.monday", "vdb.monday"):
        qemu_img("check", "-q", "-U", tmp_path / file)
    assert qemu_img.json("info", "-U", "--output=json", tmp_path / "vdb.monday")["backing-filename"]


@only_ours
def test_a_snapshot_is_of_all_disks_or_of_none(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    specs = ("--diskspec", "vda", "--diskspec", f"vdb,file={tmp_path}/there")
    assert "exists already" in daemon.live("snapshot-create-as", "x", *specs, code=1)
    assert chain(daemon, "vda")[0] == "top.qcow2"
    assert not (tmp_path / "top.x").exists()
    assert (tmp_path / "there").exists()
    assert [d["disk"] for d in daemon.result("domblklist")] == ["vda", "vdb"]


@only_ours
def test_an_internal_snapshot(daemon: Daemon, tmp_path: Path, qemu_img: Oracle) -> None:
    daemon.live("snapshot-create-as", "inside", "--diskspec", "vdb,snapshot=internal")
    assert "inside" in qemu_img("snapshot", "-U", "-l", tmp_path / "vdb.qcow2").stdout


@pytest.mark.parametrize("how", ["--pivot", "--keep-overlay"])
def test_commit_of_the_active_layer(daemon: Daemon, tmp_path: Path, how: str) -> None:
    said = daemon.live("blockcommit", "vda", "--active", how, "--verbose")
    assert ("pivoted" if how == "--pivot" else "kept") in said
    assert chain(daemon, "vda") == (
        ["base.qcow2"] if how == "--pivot" else ["top.qcow2", "middle.qcow2", "base.qcow2"]
    )
    whole(daemon)
    daemon.io("vda", "write -P 5 4M 64k")
    daemon.reads("vda", 5, "4M", "64k")
    assert daemon.live("blockjob", "vda") == "No current block job for vda\n"


def test_commit_in_the_middle_deletes_what_it_merged(daemon: Daemon, tmp_path: Path) -> None:
    daemon.live("blockcommit", "vda", "--top", "middle", "--base", "base.qcow2", "--delete")
    assert chain(daemon, "vda") == ["top.qcow2", "base.qcow2"]
    assert not (tmp_path / "middle.qcow2").exists()
    whole(daemon)


@only_ours
def test_commit_in_two_steps(daemon: Daemon) -> None:
    daemon.live("blockcommit", "vda", "--shallow", "--active", "--wait")
    shown = daemon.live("blockjob", "vda")
    assert shown.startswith("Block Commit: [100.0 %]")
    assert "ready" in shown
    daemon.live("blockjob", "vda", "--pivot")
    assert chain(daemon, "vda") == ["middle.qcow2", "base.qcow2"]
    whole(daemon)


REFUSED = [
    (("vda",), "requires --active"),
    (("vda", "--top", "middle", "--pivot"), "not the active layer"),
    (("vda", "--base", "nowhere", "--active"), "'nowhere' is no layer of 'vda'"),
    (("vda", "--base", "vda[0]", "--top", "vda[1]"), "is not below the top"),
    (("vdc", "--active"), "no disk 'vdc' (disks: vda, vdb)"),
    (("middle", "--active"), "it is the backing of 'vda-top'"),
    (("vdb", "--active"), "nothing below"),
    (("vda", "--timeout", "-1", "--active"), "Invalid timeout"),
    (("vda", "fast", "--active"), "bandwidth"),
]


@only_ours
def test_commits_refused(daemon: Daemon) -> None:
    for arguments, said in REFUSED:
        assert said in daemon.live("blockcommit", *arguments, code=1)
    assert chain(daemon, "vda") == ["top.qcow2", "middle.qcow2", "base.qcow2"]


@pytest.mark.parametrize("base", [None, "base"])
def test_pull(daemon: Daemon, base: str | None) -> None:
    daemon.live("blockpull", "vda", "--wait", *(["--base", base] if base else []))
    assert chain(daemon, "vda") == ["top.qcow2", *(["base.qcow2"] if base else [])]
    whole(daemon)


@only_ours
def test_a_job_is_limited_shown_and_cancelled(daemon: Daemon) -> None:
    daemon.live("blockpull", "vda", "--bandwidth", "64k")
    assert daemon.live("blockjob", "vda", "--bytes").endswith("Bandwidth limit: 65536 bytes/s\n")
    daemon.live("blockjob", "vda", "--bandwidth", "1", "--bytes")
    assert daemon.result("blockjob", "vda")[0]["speed"] == 1
    daemon.live("blockjob", "vda", "--abort")
    assert daemon.result("blockjob") == []
    assert len(chain(daemon, "vda")) == 3
    whole(daemon)


@only_ours
def test_what_takes_too_long_is_cancelled(daemon: Daemon) -> None:
    slow = ("vda", "--wait", "--bandwidth", "64k", "--timeout", "0.3")
    assert "took more than 0.3 s" in daemon.live("blockpull", *slow, code=1)
    assert daemon.result("blockjob") == []
    daemon.live("blockpull", "vda", "--wait")
    whole(daemon)


def test_copy_and_pivot(daemon: Daemon, tmp_path: Path) -> None:
    daemon.live("blockcopy", "vda", tmp_path / "copy.qcow2", "--pivot")
    assert chain(daemon, "vda") == ["copy.qcow2"]
    whole(daemon)


@only_ours
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_copy_and_finish(daemon: Daemon, tmp_path: Path, qemu_img: Oracle, format: str) -> None:
    daemon.live(
        "blockcopy", "vda", "copy", format, "--finish", "--synchronous-writes", cwd=tmp_path
    )
    assert len(chain(daemon, "vda")) == 3
    top = tmp_path / "top.qcow2"
    qemu_img("compare", "-U", "-F", format, top, tmp_path / "copy")


def test_a_shallow_copy(daemon: Daemon, tmp_path: Path) -> None:
    daemon.live("blockcopy", "vda", tmp_path / "copy.qcow2", "--shallow", "--pivot")
    assert chain(daemon, "vda") == ["copy.qcow2", "middle.qcow2", "base.qcow2"]
    whole(daemon)


@only_ours
def test_whoever_waits_is_told_to_end(daemon: Daemon) -> None:
    # As in the background of a script, where SIGINT is ignored.
    program = shlex.join([sys.executable, "-m", "blocklayer.cli.main", "live", str(daemon.socket)])
    line = f"trap '' INT; exec {program} blockpull vda --wait --bandwidth 64k"
    with subprocess.Popen(["sh", "-c", line], stderr=subprocess.PIPE, text=True) as waiting:
        while not daemon.qmp("query-jobs"):
            assert waiting.poll() is None
        waiting.send_signal(signal.SIGTERM)
        said = waiting.communicate(timeout=HANG_TIMEOUT_S)[1]
    assert waiting.returncode == 130
    assert "the job was cancelled" in said
    assert daemon.qmp("query-jobs") == []
    whole(daemon)


@only_ours
def test_a_copy_that_is_called_off_leaves_nothing(daemon: Daemon, tmp_path: Path) -> None:
    slow = ("vda", tmp_path / "copy", "--pivot", "--bandwidth", "64k", "--timeout", "0.3")
    daemon.live("blockcopy", *slow, code=1)
    assert not (tmp_path / "copy").exists()
    assert [d["disk"] for d in daemon.result("domblklist")] == ["vda", "vdb"]


@only_ours
def test_resize(daemon: Daemon) -> None:
    # QEMU refuses to resize what is exported; that refusal must come through.
    done = live(daemon.socket, "blockresize", "vdb", "16M")
    if done.code == 0:
        assert daemon.result("domblkinfo", "vdb")["capacity"] == 16 << 20
    else:
        assert "resize" in done.err


def test_migration_over_nbd(daemon: Daemon, tmp_path: Path, qemu_img: Oracle) -> None:
    other = tmp_path / "b"
    other.mkdir()
    qemu_img("create", "-q", "-f", "qcow2", other / "vda.qcow2", SIZE)
    with running(THEIRS, other, *disk_arguments("vda", other / "vda.qcow2")) as host_b:
        daemon.live("blockcopy", "vda", host_b.uri("vda"), "--pivot", "--wait")
        daemon.io("vda", "write -P 8 5M 64k")
        for index in range(3):
            host_b.reads("vda", index + 1, f"{index}M", "1M")
        host_b.reads("vda", 8, "5M", "64k")
        daemon.qmp("block-export-del", id="vda", mode="hard")


def test_backups_full_then_incremental(daemon: Daemon, tmp_path: Path, qemu_img: Oracle) -> None:
    daemon.io("vdb", "write -P 1 0 2M")
    full = ("--wait", "--checkpoint", "c1", "--diskspec", f"vdb,target={tmp_path}/full.qcow2")
    daemon.live("backup-begin", *full, "--diskspec", f"vda,target={tmp_path}/vda.full")
    assert daemon.result("checkpoint-list") == [{"name": "c1", "disks": ["vda", "vdb"]}]
    daemon.io("vdb", "write -P 2 1M 64k")
    # The checkpoint goes on in the overlay.
    daemon.live("snapshot-create-as", "s1", "--diskspec", "vdb")
    daemon.io("vdb", "write -P 3 4M 64k")
    spec = ("--diskspec", f"vdb,target={tmp_path}/inc.qcow2")
    done = daemon.result("backup-begin", "--incremental", "c1", "--wait", *spec)
    assert done["status"] == "finished"
    daemon.io("vdb", "write -P 4 0 64k")
    qemu_img("rebase", "-u", "-b", "full.qcow2", "-F", "qcow2", tmp_path / "inc.qcow2")
    mapped = qemu_img.json("map", "--output=json", tmp_path / "inc.qcow2")
    assert sum(extent["length"] for extent in mapped if extent["depth"] == 0) == 2 * 65536
    require("qemu-io")(
        "-c", "read -P 1 0 1M", "-c", "read -P 2 1M 64k", "-c", "read -P 3 4M 64k",
        tmp_path / "inc.qcow2",
    )  # fmt: skip
    qemu_img("compare", "-U", tmp_path / "top.qcow2", tmp_path / "vda.full")
    assert daemon.result("domjobinfo") == []
    bitmaps = [layer["bitmaps"] for layer in daemon.result("domblklist")[1]["layers"]]
    assert bitmaps == [["c1"], ["c1"]]


def test_commit_carries_checkpoints_down(daemon: Daemon, tmp_path: Path) -> None:
    daemon.live("checkpoint-create-as", "c1", "--diskspec", "vda")
    daemon.io("vda", "write -P 6 6M 64k")
    daemon.live("blockcommit", "vda", "--active", "--pivot")
    daemon.io("vda", "write -P 7 7M 64k")
    spec = ("--diskspec", f"vda,target={tmp_path}/inc.qcow2")
    daemon.live("backup-begin", "--incremental", "c1", "--wait", *spec)
    require("qemu-io")("-c", "read -P 6 6M 64k", "-c", "read -P 7 7M 64k", tmp_path / "inc.qcow2")
    daemon.live("checkpoint-delete", "c1")
    assert daemon.result("checkpoint-list") == []


def test_a_backup_that_is_pulled(daemon: Daemon, tmp_path: Path, qemu_img: Oracle) -> None:
    daemon.io("vdb", "write -P 1 0 1M")
    daemon.live("checkpoint-create-as", "c1", "--diskspec", "vdb")
    daemon.io("vdb", "write -P 2 0 64k")
    spec = ("--diskspec", "vdb,exportname=monday")
    begun = daemon.result("backup-begin", "--pull", "--incremental", "c1", *spec)
    assert begun["disks"][0]["bitmap"] == "backup-vdb"
    daemon.io("vdb", "write -P 3 0 1M")
    daemon.reads("monday", 2, "0", "64k")
    daemon.reads("monday", 1, "64k", "960k")
    changed = qemu_img.json(
        "map", "--output=json", "--image-opts",
        f"driver=nbd,server.type=unix,server.path={daemon.nbd},export=monday,"
        "x-dirty-bitmap=qemu:dirty-bitmap:backup-vdb",
    )  # fmt: skip
    dirty = [(e["start"], e["length"]) for e in changed if not e["data"]]
    assert dirty == [(0, 65536)]
    assert daemon.live("domjobinfo").startswith("backup-vdb: running")
    assert daemon.live("domjobabort") == "Backup 'backup-vdb' ended\n"
    assert chain(daemon, "vdb") == ["vdb.qcow2"]
    daemon.reads("vdb", 3, "0", "1M")


@only_ours
def test_a_pulled_backup_needs_a_server(daemon: Daemon, tmp_path: Path) -> None:
    for export in ("vda", "vdb"):
        daemon.qmp("block-export-del", id=export, mode="hard")
    daemon.qmp("nbd-server-stop")
    spec = ("--diskspec", "vdb-top", "--pull", "--checkpoint", "c1")
    assert "--server unix:PATH" in daemon.live("backup-begin", *spec, code=1)
    assert daemon.result("checkpoint-list") == []
    assert [disk["disk"] for disk in daemon.result("domblklist")] == ["vda-top", "vdb-top"]
    assert list(tmp_path.glob("*.scratch")) == []
    begun = daemon.result("backup-begin", *spec, "--server", f"unix:{daemon.nbd}")
    assert begun["disks"][0]["uri"] == daemon.uri("vdb-top")
    daemon.reads("vdb-top", 0, "0", "1M")
    daemon.live("domjobabort", "--stop-server")


@only_ours
def test_commands_are_passed_through(daemon: Daemon) -> None:
    said = daemon.live("qemu-monitor-command", '{"execute": "query-jobs"}')
    assert said == '{"return": []}\n'
    assert daemon.live("qemu-monitor-command", "query-jobs", "--return-value") == "[]\n"
    daemon.live("qemu-monitor-command", "no-such-command", code=1)
