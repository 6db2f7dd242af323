"""Amending: changing what an existing image is, its graph being at rest.

1. Options are read by the format's declaration; one that only creation knows is refused as such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from blocklayer.errors import UnsupportedError, UsageError
from blocklayer.graph.driver import Driver, FormatDriver
from blocklayer.graph.options import AmendOptions, decode
from blocklayer.graph.root import Root, drained


def amend_options(driver: type[Driver]) -> type[AmendOptions]:
    """What images of ``driver`` can be told to change. Raises UnsupportedError if nothing."""
    found = driver.amend_options() if issubclass(driver, FormatDriver) else None
    if found is None:
        raise UnsupportedError(f"Format driver '{driver.NAME}' does not support option amendment")
    return found


async def amend(
    root: Root,
    values: Mapping[str, Any],
    progress: Callable[[int, int], None],
    *,
    force: bool = False,
) -> None:
    """Change the image at ``root`` as ``values``, named as in ``-o``, say.

    ``force`` allows what may make the disk's data unreadable, such as erasing the last key.
    """
    driver = root.node.driver
    declared = amend_options(type(driver))
    assert isinstance(driver, FormatDriver)
    creation = driver.CreateOptions
    for name in values:
        if name in declared.__struct_encode_fields__:
            continue
        if creation is not None and name in creation.__struct_encode_fields__:
            raise UsageError(
                f"Invalid parameter '{name}'\nThis option is only supported for image creation"
            )
        raise UsageError(f"Invalid parameter '{name}'")
    options = decode(declared, values)
    async with drained(root.graph, root.node):
        await driver.amend(options, progress, force=force)
