"""Targets of operations that make an image from others: created, filled, removed if unfinished.

1. Creating never overwrites what is to be read.
2. A target that could not be finished is removed, whatever stopped it, and the caller is told.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from blocklayer.drivers import REGISTRY
from blocklayer.errors import BlockError, UsageError
from blocklayer.graph.create import create_image
from blocklayer.graph.filename import image_options, storage_of
from blocklayer.graph.graph import Graph
from blocklayer.graph.options import CreateOptions, unflatten
from blocklayer.graph.root import Root


def check_distinct(sources: Sequence[Root], filename: str) -> None:
    """Raise UsageError if creating ``filename`` would overwrite what is to be read."""
    try:
        target = os.stat(filename)
    except (OSError, ValueError):
        return
    for source in sources:
        for layer in source.node.chain():
            path = getattr(storage_of(layer).driver, "filename", None)
            try:
                same = path is not None and os.path.samestat(os.stat(path), target)
            except OSError:
                continue
            if same:
                raise UsageError(f"'{filename}' is read by this command and cannot be its target")


def encrypted_target(filename: str, format: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that open the target made with ``options``; empty if its name alone does."""
    secrets = {name: value for name, value in options.items() if name.endswith("key-secret")}
    if not secrets:
        return {}
    return {**image_options(filename, REGISTRY, format), **unflatten(secrets)}


async def create_target(
    graph: Graph,
    filename: str,
    format: str,
    options: Mapping[str, Any],
    size: int,
    doing: str,
    *,
    backing: str | None = None,
    backing_format: str | None = None,
) -> CreateOptions:
    """Make the image; errors of the storage read ``filename: error while DOING: …``."""
    try:
        return await create_image(
            graph,
            filename,
            format,
            options,
            size=size,
            backing=backing,
            backing_format=backing_format,
        )
    except UsageError:
        raise
    except BlockError as error:
        raise error.reworded(f"{filename}: error while {doing}: {error}") from error


class Unfinished:
    """The time while a target is being filled; use with ``with``.

    ``created``: this run made it, so that nothing is lost by removing it. After an error of this
    package ``tell`` gets what is left of it.
    """

    def __init__(
        self, filename: str, *, created: bool, tell: Callable[[str], None] = lambda message: None
    ) -> None:
        self.filename = filename
        self.left = f"'{filename}' is incomplete"
        """What an unfinished run leaves."""
        self._created = created
        self._tell = tell

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        if self._created and _remove(self.filename):
            self.left = f"'{self.filename}' was removed"
        if isinstance(error, BlockError):
            self._tell(f"not finished: {self.left}")


def _remove(filename: str) -> bool:
    path = filename.removeprefix("file:")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        os.unlink(path)
    except (OSError, ValueError):
        return False
    return True
