"""What an image's header says of its backing file, when a job changes it."""

from __future__ import annotations

import msgspec

from blocklayer.graph import io
from blocklayer.graph.driver import BackingReference, FormatDriver, ProtocolDriver
from blocklayer.graph.filename import backing_name
from blocklayer.graph.node import Node


class BackingName(msgspec.Struct, frozen=True, kw_only=True):
    """How a header is to call the new backing file."""

    filename: str | None = None
    """Exactly this; None: the name it was opened by."""
    mask_protocol: bool = False
    """Say ``raw`` where the backing node is no format but mere storage."""

    def reference(self, overlay: Node, base: Node | None) -> BackingReference | None:
        """What ``overlay`` is to say of ``base``, which may have filters above it."""
        if base is None:
            return None
        below = base.chain()[0]
        driver = below.driver.NAME
        if self.mask_protocol and isinstance(below.driver, ProtocolDriver):
            driver = "raw"
        return BackingReference(self.filename or backing_name(overlay.filename, below), driver)


def stored_reference(node: Node) -> BackingReference | None:
    """What the header of ``node`` says now."""
    driver = node.driver
    return driver.backing_reference if isinstance(driver, FormatDriver) else None


async def change_header(node: Node, reference: BackingReference | None) -> None:
    """Write ``reference`` to the header, and see it to stable storage; no request is in flight."""
    driver = node.driver
    assert isinstance(driver, FormatDriver)
    await driver.change_backing(reference)
    await io.flush(node)
