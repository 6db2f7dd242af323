"""Start-up stays light: what `import blocklayer` and `blk img info` load in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"numpy", "rich", "isal", "hypothesis", "pytest", "dataclasses", "multiprocessing", "pydoc"}


def loaded_modules(*arguments: str) -> set[str]:
    """The names of all modules a Python process imported, as `-X importtime` lists them."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_info_loads_nothing_heavy(tmp_path: Path, image_format: str) -> None:
    image = str(tmp_path / "small.img")
    blk_img = ("-m", "blocklayer.cli.main", "img")
    created = loaded_modules(*blk_img, "create", "-f", image_format, image, "1M")
    shown = loaded_modules(*blk_img, "info", image)
    assert created & HEAVY == set()
    assert shown & HEAVY == set()


def test_import_loads_nothing_heavy() -> None:
    assert loaded_modules("-c", "import blocklayer") & HEAVY == set()
