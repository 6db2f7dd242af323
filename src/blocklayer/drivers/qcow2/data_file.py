"""The data file of an image: opening it, and what cannot be had together with it.

Public:
    open_child(node, header)                 attaches ``data-file``, if the image has one
    storage_of(node, storage, header) -> Storage     where guest data live
    refuse(image, what), refuse_backing(image)       raise where the image has (a raw) one

1. A node that the user gives comes before the name in the header. That name is a path and nothing
   else, relative to the current folder (as QEMU has it), and passes the policy before it is opened.
2. Where only information is wanted the file stays closed; nothing can then be read from it. A
   check looks at its size.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from msgspec import UNSET

from blocklayer.drivers.qcow2.settings import Qcow2Options
from blocklayer.drivers.qcow2.storage import ClosedStorage, Storage
from blocklayer.errors import StorageError, UnsupportedError, UsageError
from blocklayer.graph.child import Role
from blocklayer.graph.open import data_file_options

if TYPE_CHECKING:
    from blocklayer.codec.qcow2.header import ImageHeader
    from blocklayer.drivers.qcow2.image import Image
    from blocklayer.graph.node import Node
    from blocklayer.graph.options import Reference


async def open_child(node: Node, header: ImageHeader) -> None:
    """Open the node given for guest data, else the file that the header names."""
    options, storage = node.options, node.children["file"].node
    assert isinstance(options, Qcow2Options)
    reference: Reference
    if options.data_file is not UNSET:
        if not header.has_data_file:
            raise UsageError("'data-file' can only be set for images with an external data file")
        reference = options.data_file
    elif not header.has_data_file or (node.flags.metadata_only and not node.flags.repair):
        return
    elif header.data_file:
        reference = data_file_options(storage, header.data_file)
    else:
        raise UsageError(
            f"'data-file' is required for this image: '{storage.filename}' names no file for it"
        )
    try:
        await node.open_child("data-file", reference, Role.DATA)
    except StorageError as error:
        raise _hinted(error, storage.filename, header.data_file or "") from error


def _hinted(error: StorageError, image: str, name: str) -> StorageError:
    """``error``, and what may be behind it: a name that was meant from another folder."""
    beside = os.path.join(os.path.dirname(image), name)
    if error.errno != errno.ENOENT or not name or os.path.isabs(name) or not os.path.exists(beside):
        return error
    return error.reworded(
        f"{error} (the current folder is where the data file '{name}' is looked for, not the "
        f"image's, where there is one: to use that, give data-file.filename={beside})"
    )


def storage_of(node: Node, storage: Storage, header: ImageHeader) -> Storage:
    """Where guest data live: the data file, or without one ``storage``, the image itself."""
    if not header.has_data_file:
        return storage
    edge = node.children.get("data-file")
    return ClosedStorage(storage.node.filename) if edge is None else Storage(edge)


def refuse(image: Image, what: str) -> None:
    """Raise UnsupportedError if the image has a data file, beside which ``what`` cannot be."""
    if image.geometry.data_file:
        raise UnsupportedError(
            f"Operation not supported: '{image.node.filename}' has an external data file, which "
            f"allows no {what}"
        )


def refuse_backing(image: Image) -> None:
    """Raise UsageError if the data file is raw: what a backing file holds is not in it."""
    if image.header.data_file_raw:
        raise UsageError(
            f"Invalid argument: the data file of '{image.node.filename}' is a raw image of the "
            "whole disk, which a backing file would not show in"
        )
