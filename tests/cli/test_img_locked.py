"""Images in use by another process: who is refused, who is let in, and in which words."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.runs import first_line, ours, theirs
from oracles import Oracle

HELD = """
info a.qcow2
info -U a.qcow2
map a.qcow2
map -U --output=json a.qcow2
check a.qcow2
check -U a.qcow2
check -r all a.qcow2
resize a.qcow2 5M
create -f qcow2 a.qcow2 1M
create -f qcow2 -b a.qcow2 -F qcow2 new.qcow2
"""


@pytest.fixture(scope="module")
def held(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an image that a real qemu-io has open for writing."""
    folder = tmp_path_factory.mktemp("held")
    shutil.copy(pristine / "a.qcow2", folder)
    holder = subprocess.Popen(
        ["qemu-io", "a.qcow2"],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    # Once it answers, it has the image.
    holder.stdin.write("length\n")
    holder.stdin.flush()
    while "MiB" not in holder.stdout.readline():
        assert holder.poll() is None
    yield folder
    holder.communicate("quit\n")


@pytest.mark.oracle("qemu-io", "qemu-img")
@pytest.mark.parametrize("line", HELD.strip().split("\n"))
def test_an_image_that_qemu_has_open(line: str, held: Path, qemu_img: Oracle) -> None:
    before = (held / "a.qcow2").read_bytes()
    found, wanted = ours(line, held), theirs(qemu_img, line, held)
    assert found.code == wanted.code
    assert found.out == wanted.out
    assert found.err.startswith(first_line(wanted.err))
    assert ("in use" in found.err or "using" in found.err) == bool(wanted.err)
    assert (held / "a.qcow2").read_bytes() == before
