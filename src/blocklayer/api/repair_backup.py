"""Keeping what a repair overwrites, and putting it back.

Public:
    save(rehearsal, path)            before the repair; never over an existing file
    restore(image_path, path)        the image's file is again what it was, byte for byte

1. A backup is complete and on stable storage before the repair begins.
2. An image that was changed since the repair is refused, and left as it is: each page must hold
   what it held before the repair or after it. (So a restore, or a repair, that was interrupted
   can be followed by another restore.)
3. The first page, with the header, is put back last, when all else is on stable storage.
"""

from __future__ import annotations

import os

from blocklayer.api.disk import Disk
from blocklayer.codec.repair_backup import (
    PAGE_SIZE,
    Backup,
    KeptPage,
    checksum,
    decode,
    encode,
)
from blocklayer.errors import FormatError, StorageError, UsageError
from blocklayer.graph.checking import Rehearsal


def save(rehearsal: Rehearsal, path: str) -> None:
    """Write what the rehearsed repair will overwrite to the new file ``path``."""
    pages = [KeptPage(page.offset, page.before, checksum(page.after)) for page in rehearsal.changed]
    data = encode(Backup(rehearsal.size_before, rehearsal.size_after, pages))
    try:
        # Metadata show how a disk is used: for the owner's eyes only.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(path)
    except FileExistsError:
        raise UsageError(f"The backup '{path}' exists already: name a new file") from None
    except OSError as error:
        raise StorageError(
            f"Could not write the backup '{path}': {error.strerror}", error.errno or 0
        ) from error


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


async def restore(image_path: str, path: str) -> int:
    """Put back what the backup ``path`` keeps of ``image_path``; the answer is how many bytes.

    Raises FormatError if the backup is none, or not of this image as it is now.
    """
    try:
        with open(path, "rb") as file:
            backup = decode(file.read())
    except OSError as error:
        raise StorageError(
            f"Could not read the backup '{path}': {error.strerror}", error.errno or 0
        ) from error
    except FormatError as error:
        raise FormatError(f"Could not use '{path}': {error}") from None
    disk = await Disk.open(image_path, format="raw", writable=True)
    try:
        await _check_unchanged(disk, backup, path)
        await _put_back(disk, backup)
    finally:
        await disk.close()
    return len(backup.pages) * PAGE_SIZE


async def _check_unchanged(disk: Disk, backup: Backup, path: str) -> None:
    allowed = {backup.size_before, backup.size_after}
    if not min(allowed) <= disk.size <= max(allowed):
        raise FormatError(
            f"'{path}' is not a backup of this image as it is now: the image's file has "
            f"{disk.size} bytes, and had {backup.size_after} after the repair"
        )
    for page in backup.pages:
        now = await _page(disk, page.offset)
        if now != page.before and checksum(now) != page.after_crc:
            raise FormatError(
                f"The image was changed after the repair that '{path}' belongs to (at "
                f"{page.offset:#x}): to put the old metadata back would damage it"
            )


async def _page(disk: Disk, offset: int) -> bytes:
    length = max(0, min(PAGE_SIZE, disk.size - offset))
    data = await disk.read(offset, length) if length else b""
    return data.ljust(PAGE_SIZE, b"\0")


async def _put_back(disk: Disk, backup: Backup) -> None:
    for page in sorted(backup.pages, key=lambda page: page.offset, reverse=True):
        if page.offset == 0:
            await disk.flush()
        length = min(PAGE_SIZE, backup.size_before - page.offset)
        if length > 0:
            await disk.write(page.offset, page.before[:length])
    await disk.flush()
    if disk.size != backup.size_before:
        await disk.resize(backup.size_before, shrink=True)
        await disk.flush()
