"""The registry: driver names to driver classes, loaded when first asked for.

1. Looking at an image's first bytes loads only the drivers whose magic those bytes carry.
2. Drivers of other packages come from the entry point group ``blocklayer.drivers`` and are looked
   up only for names that the table does not hold: importing metadata is slow.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import msgspec

from blocklayer.errors import UsageError
from blocklayer.graph.driver import Driver, FormatDriver, ProtocolDriver

PROBE_SIZE = 2048
"""Bytes at the start of an image that probing looks at."""


class Entry(msgspec.Struct, frozen=True):
    """One line of the table: where the class is, and what tells its images apart."""

    location: str
    """``package.module:Class``."""
    protocol: bool = False
    magics: tuple[tuple[int, bytes], ...] = ()
    """(offset, bytes) pairs; one match makes the driver a candidate for ``Driver.probe``."""
    suffixes: tuple[str, ...] = ()
    """Ends of file names that make the driver a candidate: for formats told by their end alone."""
    internal: bool = False
    """A part of some job: users cannot ask for it."""
    schemes: tuple[str, ...] = ()
    """Prefixes of file names (before ``:``) that stand for this protocol driver."""


class Registry:
    """Driver classes by name."""

    def __init__(self, table: Mapping[str, Entry]) -> None:
        self.table = dict(table)
        self._loaded: dict[str, type[Driver]] = {}
        self._schemes = {
            scheme: name for name, entry in self.table.items() for scheme in entry.schemes
        }

    def load(self, name: str) -> type[Driver]:
        """The class of driver ``name``. Raises UsageError if there is none."""
        if name not in self._loaded:
            self._loaded[name] = self._import(name)
        return self._loaded[name]

    def _import(self, name: str) -> type[Driver]:
        entry = self.table.get(name)
        if entry is not None:
            module, _, attribute = entry.location.partition(":")
            driver = getattr(importlib.import_module(module), attribute)
        else:
            driver = self._from_entry_points(name)
        if driver is None:
            raise UsageError(f"Unknown driver '{name}'")
        return driver  # type: ignore[no-any-return]

    @staticmethod
    def _from_entry_points(name: str) -> type[Driver] | None:
        from importlib.metadata import entry_points

        found = entry_points(group="blocklayer.drivers", name=name)
        return next(iter(found)).load() if found else None

    def load_format(self, name: str) -> type[FormatDriver]:
        """The class of format driver ``name``; UsageError for any other kind."""
        driver = self.load(name)
        if not issubclass(driver, FormatDriver):
            raise UsageError(f"'{name}' is not an image format")
        return driver

    def load_protocol(self, name: str) -> type[ProtocolDriver]:
        """The class of protocol driver ``name``; UsageError for any other kind."""
        driver = self.load(name)
        if not issubclass(driver, ProtocolDriver):
            raise UsageError(f"'{name}' is not a protocol driver")
        return driver

    def scheme_driver(self, scheme: str) -> str | None:
        """The protocol driver that file names starting with ``scheme:`` stand for."""
        return self._schemes.get(scheme)

    def formats(self) -> list[str]:
        """Names of all format drivers in the table."""
        return sorted(name for name, entry in self.table.items() if not entry.protocol)

    def probe(self, head: bytes, filename: str) -> str:
        """The format of an image that starts with ``head``: ``"raw"`` when nothing else fits."""
        best, name = 0, "raw"
        for candidate, entry in self.table.items():
            if any(head[at : at + len(magic)] == magic for at, magic in entry.magics) or (
                entry.suffixes and filename.endswith(entry.suffixes)
            ):
                score = self.load(candidate).probe(head, filename)
                if score > best:
                    best, name = score, candidate
        return name
