"""The real tools that tests compare blocklayer with: finding them, and running them.

1. An oracle that is missing or too old skips the test that wants it; where
   BLOCKLAYER_REQUIRE_ORACLES=1 (as in CI) it fails it, so that no comparison is lost silently.
2. A tool runs with the C locale, without standard input unless the test gives some, and under a
   limit on time that only a hang reaches.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
from typing import Any, NoReturn

import pytest

OLDEST_QEMU = 10
"""QEMU before this release prints other things, and is no oracle for outputs."""

HANG_TIMEOUT_S = 120

_SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

Argument = str | os.PathLike[str]


class Oracle:
    """One real tool, as a callable: `qemu_img("info", path)` returns the completed process."""

    def __init__(self, tool: str, path: str) -> None:
        self.tool = tool
        self.path = path

    def __call__(
        self,
        *arguments: Argument,
        check: bool = True,
        input: str | None = None,
        cwd: Argument | None = None,
        timeout_s: float = HANG_TIMEOUT_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run the tool; with `check`, an exit code other than 0 fails the test, quoting it."""
        command = [self.path, *(os.fspath(argument) for argument in arguments)]
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            cwd=cwd,
            timeout=timeout_s,
            env={**os.environ, "LC_ALL": "C"},
            **({"stdin": subprocess.DEVNULL} if input is None else {"input": input}),
        )
        if check and done.returncode != 0:
            said = f"{done.stdout}{done.stderr}".strip()
            pytest.fail(f"{shlex.join(command)}: exit code {done.returncode}: {said}")
        return done

    def json(self, *arguments: Argument, **options: Any) -> Any:
        """Run the tool and decode the JSON document it prints."""
        return json.loads(self(*arguments, **options).stdout)


@functools.cache
def find(tool: str) -> Oracle | str:
    """The oracle, or in words why there is none."""
    path = shutil.which(tool, path=_SEARCH_PATH)
    if path is None:
        return f"oracle {tool} is not installed (scripts/oracles installs it)"
    if tool.startswith("qemu-"):
        banner = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        version = re.search(r"(?:version|qemu-nbd) (\d+)", banner.stdout)
        if version is None or int(version[1]) < OLDEST_QEMU:
            said = banner.stdout.partition("\n")[0] or "an unknown version"
            return f"oracle {tool} is {said}, QEMU {OLDEST_QEMU} is needed (run scripts/oracles)"
    return Oracle(tool, path)


def require(tool: str) -> Oracle:
    """The oracle; without it, skip the test, or fail it where oracles are required."""
    found = find(tool)
    if isinstance(found, Oracle):
        return found
    miss(found)


def miss(why: str) -> NoReturn:
    """Skip the test for want of an oracle, or fail it where oracles are required."""
    if os.environ.get("BLOCKLAYER_REQUIRE_ORACLES") == "1":
        pytest.fail(why, pytrace=False)
    pytest.skip(why)
