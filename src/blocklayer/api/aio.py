"""`blocklayer.aio`: everything for asyncio callers.

To call an operation off, cancel its task: what it leaves is what each says of being cancelled, and
it ends only when no thread of it touches a file any more.
"""

from __future__ import annotations

from blocklayer.api.commit import commit
from blocklayer.api.compare import compare
from blocklayer.api.convert import convert
from blocklayer.api.disk import Disk, clone, create, inspect, stream
from blocklayer.api.rebase import rebase
from blocklayer.api.serving import serve

__all__ = [
    "Disk",
    "clone",
    "commit",
    "compare",
    "convert",
    "create",
    "inspect",
    "rebase",
    "serve",
    "stream",
]
