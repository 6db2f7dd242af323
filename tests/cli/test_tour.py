"""`blk tour`: its second half, with disks in use; every check in it holds, and it says so."""

from __future__ import annotations

from pathlib import Path

from cli.runs import ours


def test_the_live_tour(tmp_path: Path) -> None:
    outcome = ours(["tour", "--live", str(tmp_path)], tmp_path, "blk")
    assert outcome.code == 0, outcome.out + outcome.err
    assert "none lost" in outcome.out
    assert "checks passed" in outcome.out
    assert "FAILED" not in outcome.out
