"""`blocklayer.aio`: everything for asyncio callers.

To call an operation off, cancel its task: what it leaves is what each says of being cancelled, and
it ends only when no thread of it touches a file any more.
"""

from __future__ import annotations

from blocklayer.api.commit import commit
from blocklayer.api.compare import compare
from blocklayer.api.convert import convert
from blocklayer.api.disk import Disk, create, stream
from blocklayer.api.rebase import rebase

__all__ = ["Disk", "commit", "compare", "convert", "create", "rebase", "stream"]
