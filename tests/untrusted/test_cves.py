"""The public CVEs on image handling: every attack is refused or harmless, by every door.

CVE-2015-5163, 2022-47951, 2024-32498, 2024-4467, 2024-44082 and 2026-24708 have one thing in
common: an image had a file of the host opened, because its word, or its first bytes, were believed.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import blocklayer
from blocklayer import BlockError, Policy
from cli.runs import ours
from untrusted.attacks import ATTACKS, SECRET, Attack
from untrusted.opened import opened

pytestmark = pytest.mark.oracle("qemu-img")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "secret"
    path.parent.mkdir()
    path.write_bytes(SECRET)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "uploads"
    path.mkdir()
    return path


@pytest.fixture(params=ATTACKS, ids=lambda attack: attack.name)
def attack(request: pytest.FixtureRequest) -> Attack:
    return request.param  # type: ignore[no-any-return]


def inside(seen: set[str], folder: Path) -> bool:
    """Whether nothing outside of ``folder`` was opened (but for what tells the machine's state)."""
    own = (f"{folder}/", "/proc/", "/sys/", "/dev/null")
    return all(path.startswith(own) for path in seen)


def test_the_attacks_are_real(folder: Path, secret: Path) -> None:
    """Without a policy the first of them shows the secret: what watches the others does see it."""
    image = ATTACKS[0].make(folder, secret)
    with opened() as seen, blocklayer.open(image) as disk:
        assert disk.read(0, len(SECRET)) == SECRET
    assert str(secret) in seen
    assert not inside(seen, folder)


def test_inspection_says_what_is_wrong(attack: Attack, folder: Path, secret: Path) -> None:
    image = attack.make(folder, secret)
    with opened() as seen:
        report = blocklayer.inspect(image)
    assert inside(seen, folder)
    assert (report.format, report.verdict) == (attack.format, "unsafe")
    assert report.has(attack.finding)
    shown = ours(["inspect", "--output=json", str(image)], folder, "qemu-img")
    assert shown.code == 3
    assert attack.finding in {finding["id"] for finding in json.loads(shown.out)["findings"]}


@pytest.mark.parametrize("backing", [True, False])
@pytest.mark.parametrize("writable", [True, False])
def test_the_strict_policy_opens_nothing_else(
    attack: Attack, folder: Path, secret: Path, writable: bool, backing: bool
) -> None:
    image = attack.make(folder, secret)
    with opened() as seen:
        for format in (None, "raw", "qcow2", "vmdk"):
            options = {"format": format, "writable": writable, "backing": backing}
            with (
                suppress(BlockError),
                blocklayer.open(image, policy=Policy.strict(), **options) as disk,
            ):
                assert SECRET[:40] not in disk.read(0, min(disk.size, 65536))
    assert inside(seen, folder)
    assert secret.read_bytes() == SECRET


@pytest.mark.parametrize("allowed", [True, False], ids=["allow", "no references"])
def test_a_list_of_what_may_be_opened(
    attack: Attack, folder: Path, secret: Path, allowed: bool
) -> None:
    """Probing on, as many have it: still nothing outside of the list."""
    image = attack.make(folder, secret)
    policy = Policy(allow=(str(folder),)) if allowed else Policy(references=False)
    with opened() as seen, suppress(BlockError), blocklayer.open(image, policy=policy) as disk:
        assert SECRET[:40] not in disk.read(0, min(disk.size, 65536))
    assert inside(seen, folder)


COMMANDS = (
    "info",
    "info --backing-chain",
    "check",
    "map",
    "convert",
    "compare",
    "resize",
    "measure",
)


def test_commands_under_the_strict_policy(attack: Attack, folder: Path, secret: Path) -> None:
    image = attack.make(folder, secret)
    for command, format in itertools.product(COMMANDS, (None, attack.format, "raw")):
        name, *options = command.split()
        given = ["-f", format] if format else []
        line = ["--policy", "strict", name, *options, *given, str(image)]
        line += {
            "convert": ["-O", "raw", str(folder / "out.raw")],
            "compare": [str(image)],
            "resize": ["3M"],
            "measure": ["-O", "qcow2"],
        }.get(name, [])
        # A resize of what was named as raw may change it, and nothing else.
        before = image.read_bytes()
        with opened() as seen:
            run = ours(line, folder, "qemu-img")
        assert inside(seen, folder), line
        assert "internal error" not in run.err
        if format is None:
            assert run.code != 0, "nothing is guessed"
        image.write_bytes(before)
        made = folder / "out.raw"
        assert not made.exists() or SECRET[:40] not in made.read_bytes()
    assert secret.read_bytes() == SECRET


@pytest.mark.parametrize(
    "attack", [a for a in ATTACKS if a.finding != "extent-file"], ids=lambda attack: attack.name
)
def test_info_opens_nothing_that_the_image_names(
    attack: Attack, folder: Path, secret: Path
) -> None:
    """Without any policy: looking at an image is not opening what it names (CVE-2024-4467).

    The extents of a VMDK are the exception: they are the disk, and are opened as QEMU does.
    """
    image = attack.make(folder, secret)
    with opened() as seen:
        run = ours(["info", "--output=json", str(image)], folder, "qemu-img")
    assert inside(seen, folder)
    assert "internal error" not in run.err


def test_a_raw_disk_named_as_raw_is_harmless(folder: Path, secret: Path) -> None:
    """CVE-2026-24708: with its format given, a planted header is data and stays what it is."""
    from untrusted.attacks import planted_header

    disk = planted_header(folder, secret)
    head = disk.read_bytes()[:65536]
    run = ours(["--policy", "strict", "resize", "-f", "raw", str(disk), "4M"], folder, "qemu-img")
    assert run.code == 0
    assert disk.stat().st_size == 4 << 20
    assert disk.read_bytes()[:65536] == head
    assert ours(["--policy", "strict", "resize", str(disk), "4M"], folder, "qemu-img").code == 1
    with pytest.raises(BlockError, match="not in raw format"):
        blocklayer.inspect(disk, "raw")


def test_a_guest_cannot_plant_a_header_where_the_format_was_guessed(
    folder: Path, secret: Path
) -> None:
    from untrusted.attacks import backing_file

    header = backing_file(folder, secret).read_bytes()[:65536]
    disk = folder / "flat.raw"
    disk.write_bytes(bytes(1 << 20))
    with blocklayer.open(disk, writable=True) as guest, pytest.raises(BlockError):
        guest.write(0, header)
    assert blocklayer.inspect(disk).verdict == "clean"


def test_the_environment_names_the_policy_for_links(folder: Path, secret: Path) -> None:
    """Programs that call ``qemu-img`` by that name are held to it, too."""
    from untrusted.attacks import backing_file

    image = backing_file(folder, secret)
    policy = folder / "policy.json"
    policy.write_text('{"references": false, "max-depth": 3}')
    link = "from blocklayer.cli.main import main; import sys; sys.exit(main(None, 'qemu-img'))"
    line = [sys.executable, "-c", link, "convert", "-O", "raw", str(image), str(folder / "out")]
    for named, said in ((str(policy), b"policy forbids"), ("strict", b"name it")):
        done = subprocess.run(
            line, capture_output=True, check=False, env={**os.environ, "BLOCKLAYER_POLICY": named}
        )
        assert done.returncode == 1
        assert said in done.stderr
