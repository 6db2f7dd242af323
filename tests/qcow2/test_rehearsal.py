"""Repairs that are only rehearsed, and repairs that can be taken back.

A rehearsal changes nothing and foretells the repair exactly; what `--backup` kept, `--restore` puts
back byte for byte, or it refuses and changes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.codec import repair_backup
from blocklayer.codec.repair_backup import Backup, KeptPage
from blocklayer.errors import FormatError
from proof.chains import blk
from qcow2.broken import FAULTS, Broken, check


def broken(image: Broken, fault: str, folder: Path) -> tuple[Path, bytes]:
    FAULTS[fault](image)
    path = folder / "x.qcow2"
    # Sizes of files are told in whole sectors.
    content = bytes(image.content) + bytes(-len(image.content) % 512)
    path.write_bytes(content)
    return path, content


@pytest.mark.parametrize("repair", ["leaks", "all"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_dry_run_foretells_the_repair(
    image: Broken, fault: str, repair: str, tmpfs: Path
) -> None:
    path, before = broken(image, fault, tmpfs)
    dry = ("img", "check", "-r", repair, "--dry-run", path)
    code, out, said = blk(*dry, "--output=json", check=False)
    assert path.read_bytes() == before
    plain_code, _, _ = blk("img", "check", path, check=False)
    assert bool(code) == bool(plain_code)
    plan = json.loads(out) if code != 1 else None
    found, messages, fixed = check(path, repair)
    if plan is None:
        return
    assert plan["dry-run"] is True
    assert (plan["found"].get("leaks-fixed", 0), plan["found"].get("corruptions-fixed", 0)) == fixed
    if any(fixed):
        assert plan["after"].get("corruptions", 0) == found.corruptions
        assert plan["after"].get("leaks", 0) == found.leaks
    after = path.read_bytes()
    assert plan["file-size-after"] == len(after)
    before = before.ljust(len(after), b"\0")
    pages = range(0, len(after), 4096)
    differ = sum(before[at : at + 4096] != after[at : at + 4096] for at in pages)
    assert plan["would-write"] == differ * 4096
    foretold = [line.replace("Would repair ", "Repairing ") for line in said.splitlines()]
    done = [line for message in messages for line in message.splitlines()]
    repairs = [line for line in done if line.startswith("Repairing ")]
    assert [line for line in foretold if line.startswith("Repairing ")] == repairs


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_kept_is_put_back(image: Broken, fault: str, tmpfs: Path) -> None:
    path, before = broken(image, fault, tmpfs)
    kept = tmpfs / "kept"
    blk("img", "check", "-r", "all", "--backup", kept, path, check=False)
    assert kept.stat().st_mode & 0o077 == 0
    _, out, _ = blk("img", "check", "--restore", kept, path)
    assert "Put back" in out
    assert path.read_bytes() == before
    blk("img", "check", "--restore", kept, path)
    assert path.read_bytes() == before


def mended(image: Broken, folder: Path) -> tuple[Path, Path, bytes]:
    """A repaired image, the backup, and what it was before."""
    path, before = broken(image, "lost refcount", folder)
    kept = folder / "kept"
    blk("img", "check", "-r", "all", "--backup", kept, path)
    assert path.read_bytes() != before
    return path, kept, before


def test_an_interrupted_repair_or_restore(image: Broken, tmpfs: Path) -> None:
    path, kept, before = mended(image, tmpfs)
    after = path.read_bytes()
    pages = [page.offset for page in repair_backup.decode(kept.read_bytes()).pages]
    for at in pages:
        mixed = bytearray(after)
        mixed[at : at + 4096] = before[at : at + 4096]
        path.write_bytes(mixed)
        blk("img", "check", "--restore", kept, path)
        assert path.read_bytes() == before


def test_an_image_that_was_used_since_is_left_alone(image: Broken, tmpfs: Path) -> None:
    path, kept, _ = mended(image, tmpfs)
    blk("io", "-c", "write -P 9 3500k 64k", path)
    used = path.read_bytes()
    code, _, said = blk("img", "check", "--restore", kept, path, check=False)
    assert code == 1
    assert "changed after the repair" in said or "as it is now" in said
    assert path.read_bytes() == used


def test_a_backup_is_never_overwritten(image: Broken, tmpfs: Path) -> None:
    path, before = broken(image, "lost refcount", tmpfs)
    kept = tmpfs / "kept"
    kept.write_bytes(b"precious")
    code, _, said = blk("img", "check", "-r", "all", "--backup", kept, path, check=False)
    assert code == 1
    assert "exists already" in said
    assert kept.read_bytes() == b"precious"
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "options",
    [
        ("--dry-run",),
        ("--backup", "x"),
        ("-r", "all", "--dry-run", "--backup", "x"),
        ("-r", "all", "--restore", "x"),
    ],
)
def test_options_that_do_not_go_together(
    image: Broken, tmpfs: Path, options: tuple[str, ...]
) -> None:
    path = tmpfs / "x.qcow2"
    path.write_bytes(image.content)
    assert blk("img", "check", *options, path, check=False)[0] == 1
    assert path.read_bytes() == image.content


backups = st.builds(
    lambda size, more, offsets: Backup(
        size,
        size + more,
        [KeptPage(at * 4096, bytes([at]) * 4096, at * 99) for at in sorted(offsets)],
    ),
    st.integers(1 << 20, 1 << 62),
    st.integers(0, 1 << 30),
    st.sets(st.integers(0, 255), max_size=5),
)


@given(backups)
def test_backups_are_read_as_they_were_written(backup: Backup) -> None:
    assert repair_backup.decode(repair_backup.encode(backup)) == backup


@given(backups, st.data())
def test_a_damaged_backup_is_refused(backup: Backup, data: st.DataObject) -> None:
    encoded = bytearray(repair_backup.encode(backup))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FormatError):
        repair_backup.decode(bytes(encoded))
    with pytest.raises(FormatError):
        repair_backup.decode(repair_backup.encode(backup)[:at])
