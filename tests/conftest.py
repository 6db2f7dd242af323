"""What every test can use: oracle fixtures, markers, a folder in memory, hypothesis profiles.

1. A test that asks for an oracle fixture has the marker `oracle`; a test that runs a tool by
   other means carries `@pytest.mark.oracle("qemu-img", ...)` itself (bare: qemu-img). In every case
   `oracles.require` decides.
2. Tests marked `soak` run only in `make soak`. So do many more examples of all property tests:
   there it also selects `hypothesis`, the mark that hypothesis puts on them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from effort import ORDINARY
from oracles import Oracle, require

ORACLE_FIXTURES = {"qemu_img", "qemu_io", "qemu_nbd", "nbdinfo", "nbdcopy", "e2fsck", "mke2fs"}
TMPFS_ROOM = 32 << 20

# No deadline in any profile: an example's time depends on who shares the machine. For the same
# reason generating a chain of images may be "too slow" for hypothesis with nothing being wrong.
settings.register_profile(
    "dev", max_examples=ORDINARY, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
# The same examples on every run, and nothing kept between runs: a red run is red for everybody.
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, database=None)
settings.register_profile("soak", settings.get_profile("dev"), max_examples=2000, print_blob=True)
settings.load_profile("dev")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "oracle(*tools): compares with real tools")
    config.addinivalue_line("markers", "soak: long; runs only in `make soak`")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ORACLE_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.oracle())


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("oracle"):
        asked_by_fixture = ORACLE_FIXTURES.intersection(getattr(item, "fixturenames", ()))
        for tool in marker.args or (() if asked_by_fixture else ("qemu-img",)):
            require(tool)


@pytest.fixture(scope="session")
def qemu_img() -> Oracle:
    """The real qemu-img: `qemu_img("info", path)`, and `.json(...)` to decode."""
    return require("qemu-img")


@pytest.fixture(scope="session")
def qemu_io() -> Oracle:
    """The real qemu-io: `qemu_io("-f", "qcow2", "-c", "write -P 7 0 64k", path)`."""
    return require("qemu-io")


@pytest.fixture(scope="session")
def qemu_nbd() -> Oracle:
    """The real qemu-nbd: `qemu_nbd("--list", "-k", path)`."""
    return require("qemu-nbd")


@pytest.fixture(scope="session")
def nbdinfo() -> Oracle:
    """The real nbdinfo: `nbdinfo.json("--json", "--map", uri)`."""
    return require("nbdinfo")


@pytest.fixture(scope="session")
def nbdcopy() -> Oracle:
    """The real nbdcopy: `nbdcopy(uri, path)`."""
    return require("nbdcopy")


@pytest.fixture(scope="session")
def e2fsck() -> Oracle:
    """The real e2fsck: `e2fsck("-f", "-n", path)`."""
    return require("e2fsck")


@pytest.fixture(scope="session")
def mke2fs() -> Oracle:
    """The real mke2fs: `mke2fs("-q", "-t", "ext4", "-d", folder, path, "64M")`."""
    return require("mke2fs")


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, removed after the test; an ordinary one where /dev/shm has no room."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < TMPFS_ROOM:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="blocklayer-", dir=memory) as folder:
        yield Path(folder)
