"""Lines for the QMP shell: typed at a prompt with history and completion, or piped in.

1. The history of typed lines is kept in ``$XDG_STATE_HOME/blocklayer``, one file for each kind of
   prompt; where it cannot be written, nothing is kept and nothing is said.
2. What is shown while a line is being typed does not mix with it: the line is drawn again below.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from blocklayer.cli import console

_HISTORY_LINES = 1000


class Prompt:
    """Standard input, line by line. ``complete`` maps the line so far to its last word's ends."""

    def __init__(self, history: str, complete: Callable[[str], list[str]]) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._asking = ""
        self._file = _state_folder() / history
        if not self.interactive:
            return
        import readline

        self._complete = complete
        self._found: list[str] = []
        readline.set_completer(self._completed)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("tab: complete")
        readline.set_history_length(_HISTORY_LINES)
        try:
            readline.read_history_file(self._file)
        except OSError:
            pass  # the first time, or not ours to read

    def line(self, text: str) -> str | None:
        """The next line; None at the end. Raises KeyboardInterrupt at a prompt."""
        if not self.interactive:
            typed = sys.stdin.readline()
            return typed.rstrip("\n") if typed else None
        self._asking = text
        try:
            return input(text)
        except EOFError:
            console.write("\n")
            return None
        except KeyboardInterrupt:
            console.write("\n")
            raise
        finally:
            self._asking = ""

    def show(self, text: str) -> None:
        """Put ``text`` on the screen, above what is being typed."""
        if not self._asking:
            console.say(text)
            console.flush()
            return
        import readline

        console.write(f"\r\033[K{text}\n{self._asking}{readline.get_line_buffer()}")
        console.flush()

    def save(self) -> None:
        """Keep the history."""
        if not self.interactive:
            return
        import readline

        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(self._file)
        except OSError:
            pass  # a history is a convenience

    def _completed(self, text: str, state: int) -> str | None:
        import readline

        if state == 0:
            start = readline.get_line_buffer()[: readline.get_endidx()]
            self._found = self._complete(start)
            if len(self._found) == 1 and not self._found[0].endswith(("=", ".")):
                self._found[0] += " "
        return self._found[state] if state < len(self._found) else None


def _state_folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "blocklayer"
