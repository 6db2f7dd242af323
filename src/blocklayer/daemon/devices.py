"""Devices: front ends with a medium, as a guest would have them; told apart from nodes.

1. A device has an id and a medium (a hold on a node), or none: its drive is empty.
2. The hold follows the graph: an overlay, a filter or a pivot is under the device at once.
"""

from __future__ import annotations

from blocklayer.graph.node import Node
from blocklayer.graph.root import Root


class Device:
    """One front end."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.medium: Root | None = None

    @property
    def node(self) -> Node | None:
        """The node that is its medium."""
        return self.medium.node if self.medium is not None else None
