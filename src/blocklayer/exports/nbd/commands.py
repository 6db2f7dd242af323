"""What NBD clients ask of an export, served through the graph.

1. Every request gets exactly one complete reply; what failed says why, in the wire's numbers.
2. A request is judged before it has any effect: command, flags, permission, range. Reads past the
   end are EINVAL, writes ENOSPC.
3. With FUA what was written is on stable storage before the reply is made; a FLUSH covers whatever
   was answered before it, on any connection.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

import msgspec

from blocklayer.codec.nbd.constants import (
    MAX_EXTENTS,
    MAX_PAYLOAD,
    Command,
    CommandFlag,
    Mode,
    wire_errno,
)
from blocklayer.codec.nbd.messages import (
    Buffer,
    Request,
    pack_data_header,
    pack_done,
    pack_error,
    pack_extents,
    pack_hole,
    unpack_status_payload,
)
from blocklayer.errors import BlockError, ProtocolError, StorageError
from blocklayer.exports.nbd.contexts import Context
from blocklayer.exports.nbd.export import NbdExport
from blocklayer.graph import io
from blocklayer.graph.extent import Kind
from blocklayer.graph.resolve import locate
from blocklayer.units import MIB, SECTOR, align_down

Reply: TypeAlias = list[Buffer]
"""What is to be sent, one after the other."""

_CACHE_STEP: Final = 2 * MIB
_HOLE: Final = 4096
"""Zeros shorter than this are sent as data: a chunk of their own costs more."""


class Session(msgspec.Struct, frozen=True):
    """What a connection agreed on: ``contexts`` are those that its client selected, by id."""

    export: NbdExport
    mode: Mode
    contexts: dict[int, Context]


async def serve(session: Session, request: Request, payload: Buffer) -> Reply:
    """Carry out one request; the answer is its whole reply, good or bad."""
    try:
        command = _COMMANDS.get(request.command)
        if command is None:
            raise _invalid(f"unknown command {request.command}")
        serves, flags, writes = command
        if request.flags & ~(flags | (_PAYLOAD if session.mode is Mode.EXTENDED else 0)):
            raise _invalid(f"flags {request.flags:#x} do not go with command {request.command}")
        if writes and not session.export.writable:
            raise StorageError("the export is read-only", errno.EPERM)
        return await serves(session, request, payload)
    except BlockError as error:
        return [pack_error(session.mode, request, wire_errno(error.errno), str(error))]
    except MemoryError:
        return [pack_error(session.mode, request, errno.ENOMEM, "out of memory")]


def _invalid(message: str) -> StorageError:
    return StorageError(message, errno.EINVAL)


def _check(session: Session, request: Request, beyond: int) -> None:
    """Raise StorageError with errno ``beyond`` unless the range lies within the export."""
    size = session.export.size
    if request.offset + request.length > size:
        raise StorageError(
            f"{request.length:#x} bytes at {request.offset:#x} are past the end ({size:#x})", beyond
        )


def _without_payload(request: Request) -> None:
    if request.flags & _PAYLOAD:
        raise _invalid("the command takes no payload")


async def _read(session: Session, request: Request, payload: Buffer) -> Reply:
    _without_payload(request)
    _check(session, request, errno.EINVAL)
    mode, offset, length = session.mode, request.offset, request.length
    if length > MAX_PAYLOAD:
        raise _invalid(f"reads take {MAX_PAYLOAD:#x} bytes at most")
    root = session.export.root
    async with root.request("rd", offset, length):
        if mode is not Mode.SIMPLE and not request.flags & CommandFlag.DF:
            if not length:
                return [pack_done(mode, request)]
            pieces = await _pieces(session, offset, length)
            if any(hole for _, _, hole in pieces):
                return await _read_sparse(session, request, pieces)
        data = bytearray(length)
        await io.read_into(root.node, offset, memoryview(data))
    return [pack_data_header(mode, request, offset, length), data]


async def _pieces(session: Session, offset: int, length: int) -> list[tuple[int, int, bool]]:
    """The range cut at holes: (offset, length, whether it reads as zeros)."""
    node, end = session.export.node, offset + length
    pieces: list[tuple[int, int, bool]] = []
    while offset < end:
        run = await locate(node, offset, end - offset)
        stop = min(run.end, end)
        hole = run.kind is Kind.ZERO and stop - offset >= min(_HOLE, length)
        if pieces and pieces[-1][2] == hole:
            start, before, _ = pieces[-1]
            pieces[-1] = (start, before + stop - offset, hole)
        else:
            pieces.append((offset, stop - offset, hole))
        offset = stop
    return pieces


async def _read_sparse(
    session: Session, request: Request, pieces: list[tuple[int, int, bool]]
) -> Reply:
    """A reply of several chunks. Nothing is sent before all of it is there: it may still fail."""
    reply: Reply = []
    for offset, length, hole in pieces:
        done = offset + length == request.offset + request.length
        if hole:
            reply.append(pack_hole(session.mode, request, offset, length, done))
        else:
            data = bytearray(length)
            await io.read_into(session.export.node, offset, memoryview(data))
            reply += [pack_data_header(session.mode, request, offset, length, done), data]
    return reply


async def _write(session: Session, request: Request, payload: Buffer) -> Reply:
    _check(session, request, errno.ENOSPC)
    await session.export.root.write(request.offset, payload, fua=_fua(request))
    return [pack_done(session.mode, request)]


def _fua(request: Request) -> bool:
    return bool(request.flags & CommandFlag.FUA)


async def _write_zeroes(session: Session, request: Request, payload: Buffer) -> Reply:
    _without_payload(request)
    _check(session, request, errno.ENOSPC)
    await session.export.root.write_zeroes(
        request.offset,
        request.length,
        unmap=not request.flags & CommandFlag.NO_HOLE,
        fallback=not request.flags & CommandFlag.FAST_ZERO,
        fua=_fua(request),
    )
    return [pack_done(session.mode, request)]


async def _trim(session: Session, request: Request, payload: Buffer) -> Reply:
    _without_payload(request)
    _check(session, request, errno.EINVAL)
    root = session.export.root
    await root.discard(request.offset, request.length)
    if _fua(request) or root.write_through:
        await root.flush()
    return [pack_done(session.mode, request)]


async def _flush(session: Session, request: Request, payload: Buffer) -> Reply:
    _without_payload(request)
    if session.export.writable:
        await session.export.root.flush()
    return [pack_done(session.mode, request)]


async def _cache(session: Session, request: Request, payload: Buffer) -> Reply:
    """Read, so that the host has it in its memory; in steps, so that our own does not grow."""
    _without_payload(request)
    _check(session, request, errno.EINVAL)
    end = request.offset + request.length
    buffer = memoryview(bytearray(min(request.length, _CACHE_STEP)))
    for offset in range(request.offset, end, _CACHE_STEP):
        # One hold a step: a graph change need not wait for all of a large disk.
        if session.export.shutting_down:
            raise StorageError("the export is being removed", errno.ESHUTDOWN)
        await session.export.root.read_into(offset, buffer[: min(_CACHE_STEP, end - offset)])
    return [pack_done(session.mode, request)]


async def _block_status(session: Session, request: Request, payload: Buffer) -> Reply:
    mode, chosen = session.mode, session.contexts
    if request.flags & _PAYLOAD:
        try:
            length, ids = unpack_status_payload(payload)
        except ProtocolError as error:
            raise _invalid(str(error)) from None
        if len(set(ids)) != len(ids) or not chosen.keys() >= set(ids):
            raise _invalid("contexts that were not selected")
        chosen = {each: chosen[each] for each in ids}
        request = msgspec.structs.replace(request, length=length, flags=0)
    if not chosen:
        raise _invalid("no contexts were selected")
    _check(session, request, errno.EINVAL)
    if not request.length:
        raise _invalid("block status needs a length")
    length = request.length
    if mode is not Mode.EXTENDED:
        length = min(length, align_down(2**32 - 1, SECTOR))
    limit = 1 if request.flags & CommandFlag.REQ_ONE else MAX_EXTENTS
    reply: Reply = []
    root = session.export.root
    async with root.request():
        for index, (number, context) in enumerate(chosen.items()):
            extents = await context.extents(
                root.node, request.offset, length, limit=limit, wide=mode is Mode.EXTENDED
            )
            reply.append(pack_extents(mode, request, number, extents, index == len(chosen) - 1))
    return reply


_PAYLOAD: Final = int(CommandFlag.PAYLOAD_LEN)
_Serve: TypeAlias = Callable[[Session, Request, Buffer], Awaitable[Reply]]

# Command: (function, flags that go with it, whether it writes).
_FUA: Final = int(CommandFlag.FUA)
_COMMANDS: Final[dict[int, tuple[_Serve, int, bool]]] = {
    Command.READ: (_read, int(CommandFlag.DF) | _FUA, False),
    Command.WRITE: (_write, _FUA, True),
    Command.FLUSH: (_flush, _FUA, False),
    Command.TRIM: (_trim, _FUA, True),
    Command.CACHE: (_cache, _FUA, False),
    Command.WRITE_ZEROES: (
        _write_zeroes,
        _FUA | int(CommandFlag.NO_HOLE) | int(CommandFlag.FAST_ZERO),
        True,
    ),
    Command.BLOCK_STATUS: (_block_status, int(CommandFlag.REQ_ONE) | _FUA, False),
}
