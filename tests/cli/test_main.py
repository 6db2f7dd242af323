"""The program as a whole: names, help, versions, exit codes, and ends that come from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blocklayer.cli.img import COMMANDS, OWN
from blocklayer.cli.main import GROUPS, load_command
from blocklayer.cli.options import fields_of
from cli.runs import Outcome, ours
from oracles import Oracle

BLK = [sys.executable, "-m", "blocklayer.cli.main"]


def blk(line: str, folder: Path) -> Outcome:
    return ours(line, folder, "blk")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "blk: Not enough arguments\nTry 'blk --help' for more info\n"),
        ("nothing", "blk: Command not found: nothing\nTry 'blk --help' for more info\n"),
        ("-x", "blk: unrecognized option '-x'\nTry 'blk --help' for more info\n"),
        ("img", "blk img: Not enough arguments\nTry 'blk img --help' for more info\n"),
        ("img fly", "blk img: Command not found: fly\nTry 'blk img --help' for more info\n"),
        ("img info", "blk img: Expecting one image file name\n"
                     "Try 'blk img info --help' for more info\n"),
        ("img info --fly", "blk img info: unrecognized option '--fly'\n"
                           "Try 'blk img info --help' for more info\n"),
        ("img info gone", "blk img: Could not open 'gone': Could not open 'gone': "
                          "No such file or directory\n"),
    ],
)  # fmt: skip
def test_messages_name_the_program(line: str, message: str, tmp_path: Path) -> None:
    assert blk(line, tmp_path) == Outcome(1, "", message)


def test_version_names_the_tool_that_is_resembled(tmp_path: Path) -> None:
    assert ours("--version", tmp_path, "qemu-img").out.startswith("qemu-img version 10.")
    assert blk("-V", tmp_path).out.startswith("blk (blocklayer ")


def test_help_lists_everything(tmp_path: Path) -> None:
    assert all(f"  {name} - " in blk("--help", tmp_path).out for name in GROUPS)
    assert all(f"  {name} - " in blk("img --help", tmp_path).out for name in COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_shows_every_option(name: str, tmp_path: Path) -> None:
    found = blk(f"img {name} --help", tmp_path)
    assert (found.code, found.err) == (0, "")
    for field in fields_of(load_command(COMMANDS[name])):
        assert f"--{field.long_names[0]}" in found.out
    assert max(len(line) for line in found.out.splitlines()) <= 80


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - OWN))
def test_the_options_of_the_real_tool_are_known(
    name: str, tmp_path: Path, qemu_img: Oracle
) -> None:
    """Every long name that its help shows; what is left out here needs features to come."""
    to_come = {
        "object",
    }
    shown = qemu_img(name, "--help").stdout
    wanted = {
        word.split("=")[0].strip("[]()'|,.").removeprefix("--")
        for word in shown.split()
        if word.startswith("--")
    }
    known = {long for field in fields_of(load_command(COMMANDS[name])) for long in field.long_names}
    # "--progres", says the real tool: it is --progress, cut short.
    assert wanted - known - to_come - {"progres"} == set()


def test_a_link_makes_it_the_tool(tmp_path: Path) -> None:
    link = tmp_path / "qemu-img"
    link.symlink_to(Path(sys.executable).parent / "blk")
    done = subprocess.run([link, "info", "gone"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("qemu-img: Could not open 'gone': ")


def test_a_reader_that_goes_away_is_no_error(pristine: Path) -> None:
    pipe = subprocess.Popen(
        [*BLK, "img", "map", "--output=json", pristine / "mixed.qcow2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert pipe.stdout is not None
    pipe.stdout.close()
    assert pipe.stderr is not None
    assert pipe.stderr.read() == b""
    pipe.stderr.close()
    assert pipe.wait() == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_cannot_be_written_is_an_error(pristine: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*BLK, "img", "info", pristine / "a.qcow2"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "blk img: cannot write to standard output: No space left on device\n"


def test_names_that_are_not_utf_8_are_shown_as_they_are(tmp_path: Path) -> None:
    name = b"caf\xe9.raw"
    (tmp_path / os.fsdecode(name)).write_bytes(bytes(512))
    done = subprocess.run(
        [*BLK, "img", "info", name], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith(b"image: " + name + b"\n")


def test_a_bug_is_reported_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "broken", "blocklayer.cli.img:gone")
    found = blk("img broken", tmp_path)
    assert found.code == 1
    assert "please report it" in found.err
    assert found.err.count("\n") == 1
    monkeypatch.setenv("BLOCKLAYER_DEBUG", "1")
    assert "Traceback" in blk("img broken", tmp_path).err


def test_control_c_while_changing_an_image(tmp_path: Path, qemu_img: Oracle) -> None:
    """Interrupted at its first wait, the image is sound and the user is told."""
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", "1M")
    script = (
        "import os, signal, sys\n"
        "from blocklayer.cli import main\n"
        "from blocklayer.api.disk import Disk\n"
        "import asyncio\n"
        "async def resize(self, *arguments, **options):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    await asyncio.sleep(60)\n"
        "Disk.resize = resize\n"
        "sys.exit(main.main(['img', 'resize', 'a.qcow2', '2M'], 'blk'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == (
        "blk img: interrupted: 'a.qcow2' is valid, with its old or its new size\n"
    )
    qemu_img("check", tmp_path / "a.qcow2")
