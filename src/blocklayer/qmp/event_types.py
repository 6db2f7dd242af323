"""All events on one screen: names, data, limits.

1. ``EVENTS`` is what ``query-qmp-schema`` shows, so an event belongs there from the day that
   something emits it.
"""

from __future__ import annotations

from typing import Final

from blocklayer.qmp.events import Event

EVENTS: Final[tuple[type[Event], ...]] = ()
