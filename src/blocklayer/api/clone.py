"""Instant clones: many qcow2 overlays of one base image, each made by a handful of system calls.

1. The base and its chain are opened once, for the size and the format, which every clone names: no
   clone is ever probed for what is below it.
2. A clone appears under its name complete or not at all. It is written to a file without a name
   (where the file system has no such files: with one of its own), and then given its name.
3. What exists is refused. With ``force`` it is replaced, if it is a regular file that nobody has
   open, and no layer of the base's own chain.
4. With ``sync`` a clone is on stable storage before it has its name, and the name is when the call
   returns. Without it a power failure may leave a clone that was never flushed empty; a guest's
   first flush makes the header as safe as the guest's data.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Final

from blocklayer.drivers import REGISTRY
from blocklayer.drivers.qcow2.create import Qcow2CreateOptions, new_header
from blocklayer.drivers.qcow2.layout import plan, refcount_pieces
from blocklayer.errors import StorageError, UsageError
from blocklayer.graph.driver import ProtocolDriver
from blocklayer.graph.filename import scheme_of, storage_of
from blocklayer.graph.gate import Policy
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_image, open_options
from blocklayer.graph.options import decode
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.graph.waiting import offload
from blocklayer.units import SECTOR, align_up, parse_size

OPTIONS: Final = (
    "cluster_size",
    "compat",
    "compression_type",
    "extended_l2",
    "lazy_refcounts",
    "refcount_bits",
)
"""Options of new qcow2 images that clones can have."""

_MODE = 0o644
_NO_NAMELESS_FILES = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)

Pieces = list[tuple[int, bytes]]


async def clone(
    base: str | os.PathLike[str],
    names: Iterable[str | os.PathLike[str]],
    *,
    format: str | None = None,
    size: int | str | None = None,
    relative: bool = False,
    force: bool = False,
    sync: bool = False,
    policy: Policy | None = None,
    **options: Any,
) -> list[str]:
    """Make an overlay of ``base`` under each of ``names``; the answer is their paths.

    ``format`` is the base's, guessed once if it is None. ``size`` is the base's unless given, in
    bytes or as text. ``relative`` stores the base's name as seen from each clone, instead of its
    absolute path. ``options`` are those of ``OPTIONS``, named as in ``-o``. The first error ends
    the call: clones made before it stay. Raises BlockError.
    """
    source = os.fspath(base)
    targets = [os.fspath(name) for name in names]
    wrong = sorted(options.keys() - set(OPTIONS))
    if wrong:
        raise UsageError(f"A clone cannot be given '{wrong[0]}' (only {', '.join(OPTIONS)})")
    graph = Graph(REGISTRY, policy)
    node = await open_image(graph, source, format=format, flags=Flags(force_share=True))
    try:
        values = {**options, "size": _size(size, node)}
        decoded = decode(Qcow2CreateOptions, {**values, "backing_fmt": node.driver.NAME})
        template = Template(source, decoded, relative=relative)
        layers = {_identity(layer) for layer in node.chain()} - {None}
    finally:
        await graph.release(node)
    if force:
        for target in targets:
            await _check_replaceable(graph, target, layers)
    await offload(_make_all, template, targets, force, sync)
    return targets


def _size(size: int | str | None, node: Node) -> int:
    if size is None:
        return node.size
    return parse_size(size) if isinstance(size, str) else size


def _identity(node: Node) -> object | None:
    driver = storage_of(node).driver
    return driver.identity() if isinstance(driver, ProtocolDriver) else None


async def _check_replaceable(graph: Graph, target: str, layers: set[object | None]) -> None:
    """Raise unless nothing is lost but the file ``target`` when it is replaced."""
    try:
        status = os.lstat(target)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UsageError(f"Could not create '{target}': {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"'{target}' is no regular file and cannot be replaced by a clone")
    if (status.st_dev, status.st_ino) in layers:
        raise UsageError(f"'{target}' is a part of the base image and cannot be its clone")
    # Its locks tell whether another program has it open.
    options = {"driver": "file", "filename": target}
    node = await open_options(graph, options, Flags(read_only=False))
    try:
        user = Root(node, "cloning", Permission.WRITE | Permission.RESIZE, shared=0)
    except BaseException:
        await graph.release(node)
        raise
    await user.close()


class Template:
    """The bytes of every clone of one base image."""

    def __init__(self, base: str, options: Qcow2CreateOptions, *, relative: bool = False) -> None:
        plain = not base.startswith("json:") and scheme_of(base) in (None, "file")
        self._base = os.path.abspath(base.removeprefix("file:")) if plain else base
        self._options = options
        self._relative = relative and plain
        self._made: dict[str, Pieces] = {}
        self._layout = plan(options.geometry, align_up(options.size, SECTOR))
        self.file_size = self._layout.file_size
        """Bytes of each clone's file; most of them are holes."""
        self.pieces(".")

    def pieces(self, folder: str) -> Pieces:
        """What is to be written to a clone in ``folder``; the rest of the file is zeros."""
        place = folder if self._relative else ""
        if place not in self._made:
            self._made[place] = self._make(place)
        return self._made[place]

    def _make(self, folder: str) -> Pieces:
        options = self._options
        options.backing_file = self._base
        if self._relative:
            options.backing_file = os.path.relpath(self._base, os.path.abspath(folder or "."))
            if scheme_of(options.backing_file) is not None:
                options.backing_file = f"./{options.backing_file}"
        options.validate()
        header = new_header(options, self._layout).encode()
        whole = [(0, header[: self.file_size]), *refcount_pieces(self._layout)]
        # What is zero is left as a hole: a clone takes three blocks of storage, not three clusters.
        return [(offset, data.rstrip(b"\0")) for offset, data in whole if any(data)]


class _Folder:
    """A folder that clones are made in; use with ``with``."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # Naming such a file afterwards goes through /proc.
        self._nameless = hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd")

    def __enter__(self) -> _Folder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def sync(self) -> None:
        """Bring the names to stable storage."""
        os.fsync(self._fd)

    def make(self, name: str, template: Template, force: bool, sync: bool) -> None:
        """Make the clone ``name``. Raises OSError, FileExistsError among them."""
        fd = self._open_nameless() if self._nameless else None
        if fd is None:
            self._make_named(name, template, force, sync)
            return
        try:
            self._fill(fd, template, sync)
            first = _own_name(name) if force else name
            os.link(f"/proc/self/fd/{fd}", first, dst_dir_fd=self._fd, follow_symlinks=True)
            if force:
                self._rename(first, name)
        finally:
            os.close(fd)

    def _open_nameless(self) -> int | None:
        try:
            return os.open(self.path, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, _MODE)
        except OSError as error:
            if error.errno not in _NO_NAMELESS_FILES:
                raise
            self._nameless = False
            return None

    def _make_named(self, name: str, template: Template, force: bool, sync: bool) -> None:
        own = _own_name(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(own, flags, _MODE, dir_fd=self._fd)
        try:
            self._fill(fd, template, sync)
            if not force:
                os.link(own, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except BaseException:
            os.unlink(own, dir_fd=self._fd)
            raise
        finally:
            os.close(fd)
        if force:
            self._rename(own, name)
        else:
            os.unlink(own, dir_fd=self._fd)

    def _rename(self, own: str, name: str) -> None:
        try:
            os.replace(own, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except BaseException:
            os.unlink(own, dir_fd=self._fd)
            raise

    def _fill(self, fd: int, template: Template, sync: bool) -> None:
        os.ftruncate(fd, template.file_size)
        for offset, data in template.pieces(self.path):
            written = os.pwrite(fd, data, offset)
            while written < len(data):
                written += os.pwrite(fd, data[written:], offset + written)
        if sync:
            os.fsync(fd)


def _own_name(name: str) -> str:
    """A name for the time before a clone has ``name``; of a length that any file may have."""
    return f".{name[:64]}.{os.urandom(8).hex()}"


def _make_all(template: Template, targets: list[str], force: bool, sync: bool) -> None:
    folders: dict[str, _Folder] = {}
    made = 0
    try:
        for target in targets:
            path, name = os.path.split(target)
            try:
                folder = folders.get(path)
                if folder is None:
                    folder = folders[path] = _Folder(path or ".")
                folder.make(name, template, force, sync)
            except (OSError, ValueError) as error:
                raise _failure(target, error, made, len(targets)) from error
            made += 1
        for target, folder in folders.items() if sync else ():
            try:
                folder.sync()
            except OSError as error:
                raise _failure(target or ".", error, made, made) from error
    finally:
        for folder in folders.values():
            folder.__exit__(None, None, None)


def _failure(target: str, error: OSError | ValueError, made: int, wanted: int) -> Exception:
    said = f" ({made} of {wanted} clones were made)" if made else ""
    if isinstance(error, FileExistsError):
        return UsageError(f"'{target}' exists already: a clone replaces it only if forced{said}")
    if isinstance(error, OSError):
        reason = StorageError.from_os(error, f"Could not create '{target}'", target)
        return reason.reworded(f"{reason}{said}")
    return UsageError(f"Could not create '{target}': {error}{said}")
