"""Block nodes' options as QMP arguments: the drivers' own declarations, joined by ``driver``.

    async def blockdev_add(monitor: Monitor, arguments: BlockdevOptions) -> None: ...

1. Values stay dicts of plain JSON, checked by the driver's declaration at every level; opening
   decodes them once more into the drivers' structs.
2. Drivers are imported when the first such argument is checked, or the schema is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec

from blocklayer.drivers import REGISTRY
from blocklayer.graph.options import NodeOptions
from blocklayer.qmp.shapes import STRING, Alternate, Shape, Variants, define


def _drivers() -> Mapping[str, type[msgspec.Struct]]:
    return {
        name: REGISTRY.load(name).Options
        for name, entry in REGISTRY.table.items()
        if not entry.internal
    }


_NODE: Final = Variants(
    name="BlockdevOptions",
    tag="driver",
    common=NodeOptions,
    structs=_drivers,
    # The drivers miss these themselves, since a file name may stand for them; not so here.
    required=frozenset(("file", "filename")),
)
BlockdevOptions = Annotated[dict[str, Any], _NODE]
"""The annotation for arguments that are a node's options."""


@define("BlockdevRef")
def _reference() -> Shape:
    return Alternate("BlockdevRef", (_NODE.shape(), STRING))
