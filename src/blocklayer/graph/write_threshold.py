"""Write thresholds: word is given once when a node is written past an offset.

Whoever keeps a disk in a volume that grows asks for it: the event says that it is time.
"""

from __future__ import annotations

from blocklayer.graph.events import BlockWriteThreshold
from blocklayer.graph.node import Node


class WriteThreshold:
    """Watches one node until it is written past ``offset``."""

    def __init__(self, node: Node, offset: int) -> None:
        self.node = node
        self.offset = offset

    def changed(self, offset: int, length: int) -> None:
        """Tell, if the range ends behind the threshold; then watch no more."""
        exceeded = offset + length - self.offset
        if exceeded > 0:
            self.node.unwatch(self)
            self.node.graph.notify(
                BlockWriteThreshold(
                    node_name=self.node.name,
                    amount_exceeded=exceeded,
                    write_threshold=self.offset,
                )
            )

    def resized(self, size: int) -> None:
        """Of no interest."""


def find(node: Node) -> int:
    """The offset that is watched on ``node``; 0: none."""
    return next((w.offset for w in node.watchers if isinstance(w, WriteThreshold)), 0)


def put(node: Node, offset: int) -> None:
    """Watch ``offset`` in place of what was watched; 0: watch none."""
    for watcher in node.watchers:
        if isinstance(watcher, WriteThreshold):
            node.unwatch(watcher)
    if offset:
        node.watch(WriteThreshold(node, offset))
