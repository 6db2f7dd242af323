"""The user objects of one command line: what ``--object`` defined, for every graph it makes."""

from __future__ import annotations

from collections.abc import Sequence

from blocklayer.drivers import REGISTRY
from blocklayer.graph.graph import Graph
from blocklayer.graph.objects import Objects

_defined = [Objects()]


def define(texts: Sequence[str]) -> None:
    """Begin anew, with the objects that these arguments of ``--object`` describe."""
    objects = Objects()
    for text in texts:
        objects.define(text)
    _defined[0] = objects


def new_graph() -> Graph:
    """A graph that knows the command line's objects."""
    return Graph(REGISTRY, objects=_defined[0])
