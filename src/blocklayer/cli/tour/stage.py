"""The stage of the tour: narration, commands shown and run, and checks that count.

1. Every command shown is the one that runs, as if typed in the tour's folder.
2. A check that fails ends the tour with exit code 1; nothing is claimed that was not just tested.
3. Tools of others (e2fsck, qemu-img) are used where they are installed, and named where not.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from blocklayer.api.disk import Disk
from blocklayer.units import MIB

_CHUNK = 4 * MIB


class TourError(Exception):
    """A check of the tour did not hold."""


class Stage:
    """Where the tour plays: a folder, the screen, and the tally of checks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checks = 0
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._scene = 0

    def _styled(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    def scene(self, title: str) -> None:
        """Begin a numbered scene."""
        self._scene += 1
        print(f"\n{self._styled(f'{self._scene}. {title}', '1')}")

    def say(self, text: str) -> None:
        """Tell what happens, in plain words."""
        print(f"   {text}")

    def blk(self, command: str, *, show: bool = True, limit: int = 12) -> None:
        """Run ``blk COMMAND``; show it and the first lines it prints."""
        self.command(f"blk {command}")
        done = self._run(sys.executable, "-m", "blocklayer.cli.main", *shlex.split(command))
        lines = done.stdout.splitlines()
        for line in lines[:limit] if show else []:
            print(f"     {line}")
        if show and len(lines) > limit:
            print(f"     … {len(lines) - limit} more lines")
        self.check(done.returncode == 0, f"blk {command}: {_all(done)}", quiet=True)

    def check(self, holds: bool, what: str, *, quiet: bool = False) -> None:
        """Count a check; the tour ends if it does not hold."""
        if not holds:
            print(f"   {self._styled('FAILED', '31;1')} {what}")
            raise TourError(what)
        self.checks += 1
        if not quiet:
            print(f"   {self._styled('✓', '32')} {what}")

    def command(self, line: str) -> None:
        """Show a command that does what happens next."""
        print(f"   {self._styled('$ ' + line, '36')}")

    def chain(self, *layers: str, user: str | None = None) -> None:
        """Draw the chain as the talk does: base on the left, the active layer on the right.

        ``user`` is what writes to the active layer meanwhile.
        """
        drawn = " <── ".join(f"[{layer}]" for layer in layers)
        if user is not None:
            print(f"       {self._styled(drawn, '33')} <══ {user}")
            return
        print(f"\n       {self._styled(drawn, '33')}  (active)\n")

    async def digest(self, image: str) -> str:
        """SHA-256 of what a guest would read from ``image``."""
        summing = hashlib.sha256()
        async with await Disk.open(self.folder / image) as disk:
            for offset in range(0, disk.size, _CHUNK):
                summing.update(await disk.read(offset, min(_CHUNK, disk.size - offset)))
        return summing.hexdigest()

    async def same_bytes(self, image: str, expected: bytes | bytearray, what: str) -> None:
        """Check every byte that a guest would read from ``image``."""
        self.check(await self.digest(image) == hashlib.sha256(expected).hexdigest(), what)

    def sound(self, *images: str) -> None:
        """Check the metadata of ``images``: with our own check, and with QEMU's if it is here."""
        for image in images:
            self.blk(f"img check -q {image}")
            self.foreign_check(self.folder / image)
        by = "blk and qemu-img" if shutil.which("qemu-img") else "blk"
        self.check(True, f"metadata of {', '.join(images)} is sound, says {by}")

    def foreign_check(self, image: Path) -> None:
        """Let QEMU's own tool check the metadata of ``image``, if it is here."""
        if shutil.which("qemu-img"):
            done = self._run("qemu-img", "check", "-q", str(image))
            said = f"qemu-img check {image}: {_all(done)}"
            self.check(done.returncode == 0, said, quiet=True)

    def file_system_sound(self, raw: str) -> None:
        """Check the file system in a raw image, if e2fsck is here."""
        if not shutil.which("e2fsck"):
            self.say("(e2fsck is not installed: the file system is checked by its bytes only)")
            return
        done = self._run("e2fsck", "-fn", raw)
        self.check(done.returncode == 0, f"e2fsck finds the file system in {raw} sound")

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)


def _all(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stdout + done.stderr).strip()
