"""Sockets from addresses: connecting and listening.

1. Names are resolved in a thread; nothing here blocks the loop. Sockets come out non-blocking and
   are not inherited by programs started later.
2. Who listens on a path that holds a socket takes its place, as QEMU does (one that is left over
   from a crash is no obstacle); anything else at that path stays, and is an error.
3. Errors name the address as it was given.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Callable, Mapping
from typing import Any

from blocklayer.codec.addresses import (
    MAX_UNIX_PATH,
    AnyAddress,
    FdSocketAddress,
    InetSocketAddress,
    UnixSocketAddress,
    VsockSocketAddress,
)
from blocklayer.errors import StorageError, UsageError

_BACKLOG = 128
_IPPROTO_MPTCP = 262
_MAX_PORT = 0xFFFF


async def connect(address: AnyAddress, names: Mapping[str, int] | None = None) -> socket.socket:
    """A connected stream socket.

    ``names`` are the descriptors that were given names (``getfd``). Raises StorageError, or
    UsageError for an address that cannot be one.
    """
    if isinstance(address, FdSocketAddress):
        return _adopt(address, names or {}, listening=False)
    loop, problem = asyncio.get_running_loop(), None
    for family, protocol, place in await _places(address, passive=False):
        sock = _new_socket(family, protocol, address)
        try:
            await loop.sock_connect(sock, place)
        except OSError as error:
            sock.close()
            problem = error
        except BaseException:
            sock.close()
            raise
        else:
            _tune(sock, address)
            return sock
    raise _failure(problem, f"Failed to connect to '{address}'")


async def listen(address: AnyAddress, names: Mapping[str, int] | None = None) -> socket.socket:
    """A listening stream socket, on the first of the address's places that can be had.

    Raises as ``connect`` does.
    """
    if isinstance(address, FdSocketAddress):
        return _adopt(address, names or {}, listening=True)
    problem = None
    for family, protocol, place in await _places(address, passive=True):
        sock = _new_socket(family, protocol, address)
        try:
            if family == socket.AF_UNIX:
                _clear_path(place)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6 and getattr(address, "ipv4", None) is not True:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(place)
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            problem = error
        else:
            return sock
    raise _failure(problem, f"Failed to bind socket to {address}")


async def accept(listener: socket.socket, address: AnyAddress) -> socket.socket:
    """The next client, with the options of ``address`` in force."""
    # The loop's own sock_accept loses the client if it is cancelled as one comes.
    while True:
        await wait_readable(listener.fileno())
        try:
            sock, _ = listener.accept()
            break
        except (BlockingIOError, ConnectionAbortedError):
            continue  # it has left again
    sock.setblocking(False)
    _tune(sock, address)
    return sock


def local_address(listener: socket.socket) -> str:
    """Where ``listener`` really listens: a path, or host and port."""
    name = listener.getsockname()
    if isinstance(name, tuple):
        host = f"[{name[0]}]" if listener.family == socket.AF_INET6 else name[0]
        return f"{host}:{name[1]}"
    return os.fsdecode(name)


def forget(address: AnyAddress) -> None:
    """Remove the path that listening on ``address`` made."""
    if isinstance(address, UnixSocketAddress) and not address.abstract:
        try:
            _clear_path(address.path)
        except OSError:
            pass  # gone already, or another's: nothing that closing could mend


_Place = tuple[int, int, tuple[Any, ...] | str | bytes]
"""(family, protocol, what bind and connect take)"""


async def _places(address: AnyAddress, *, passive: bool) -> list[_Place]:
    if isinstance(address, UnixSocketAddress):
        return [(socket.AF_UNIX, 0, _unix_name(address))]
    if isinstance(address, VsockSocketAddress):
        try:
            return [(socket.AF_VSOCK, 0, (int(address.cid, 0), int(address.port, 0)))]
        except ValueError:
            raise UsageError(f"Invalid vsock address '{address}': use two numbers") from None
    assert isinstance(address, InetSocketAddress)
    return await _inet_places(address, passive=passive)


def _unix_name(address: UnixSocketAddress) -> str | bytes:
    raw = os.fsencode(address.path)
    if len(raw) > MAX_UNIX_PATH or b"\0" in raw:
        raise UsageError(
            f"UNIX socket path '{address.path}' is too long (at most {MAX_UNIX_PATH} bytes)"
        )
    if not address.abstract:
        return address.path
    return b"\0" + (raw if address.tight else raw.ljust(MAX_UNIX_PATH, b"\0"))


async def _inet_places(address: InetSocketAddress, *, passive: bool) -> list[_Place]:
    if address.ipv4 is False and address.ipv6 is False:
        raise UsageError("Cannot disable IPv4 and IPv6 at the same time")
    family = socket.AF_UNSPEC
    if (address.ipv4 is True and address.ipv6 is not True) or address.ipv6 is False:
        family = socket.AF_INET
    elif (address.ipv6 is True and address.ipv4 is not True) or address.ipv4 is False:
        family = socket.AF_INET6
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV if address.numeric else 0
    flags |= socket.AI_PASSIVE if passive else 0
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            address.host or None, address.port, family=family, type=socket.SOCK_STREAM, flags=flags
        )
    except OSError as error:
        raise StorageError(
            f"address resolution failed for {address}: {error.strerror}", errno.ENXIO
        ) from error
    protocol = _IPPROTO_MPTCP if address.mptcp else 0
    places: list[_Place] = []
    for family, _, _, _, place in found:
        host, port, *rest = place
        last = port
        if passive and isinstance(address.to, int):
            last = min(max(port, address.to), _MAX_PORT)
        places += [(family, protocol, (host, p, *rest)) for p in range(int(port), int(last) + 1)]
    return places


def _new_socket(family: int, protocol: int, address: AnyAddress) -> socket.socket:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM, protocol)
    except OSError as error:
        raise StorageError.from_os(error, f"Failed to create a socket for '{address}'") from error
    sock.setblocking(False)
    return sock


def _tune(sock: socket.socket, address: AnyAddress) -> None:
    """What is set on a connection, whichever side began it."""
    if not isinstance(address, InetSocketAddress):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if address.keep_alive:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for value, option in (
        (address.keep_alive_count, socket.TCP_KEEPCNT),
        (address.keep_alive_idle, socket.TCP_KEEPIDLE),
        (address.keep_alive_interval, socket.TCP_KEEPINTVL),
    ):
        if isinstance(value, int) and value:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _clear_path(path: object) -> None:
    if isinstance(path, str) and os.path.lexists(path) and stat.S_ISSOCK(os.lstat(path).st_mode):
        os.unlink(path)


def _adopt(address: FdSocketAddress, names: Mapping[str, int], *, listening: bool) -> socket.socket:
    number = names.get(address.name)
    if number is None:
        if not address.name.isdigit():
            raise UsageError(f"File descriptor named '{address.name}' has not been found")
        number = int(address.name)
    try:
        sock = socket.socket(fileno=os.dup(number))
        listens = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        raise StorageError.from_os(error, f"File descriptor '{address}' is no socket") from error
    if listens != listening:
        sock.close()
        raise UsageError(
            f"File descriptor '{address}' is {'' if listens else 'not '}a listening socket"
        )
    sock.setblocking(False)
    return sock


def _failure(problem: OSError | None, doing: str) -> StorageError:
    if problem is None:
        return StorageError(f"{doing}: the name stands for no address", errno.EADDRNOTAVAIL)
    return StorageError.from_os(problem, doing)


async def wait_readable(descriptor: int) -> None:
    """Wait until reading from ``descriptor`` would not; at once for a regular file."""
    loop = asyncio.get_running_loop()
    await _wait(descriptor, loop.add_reader, loop.remove_reader)


async def wait_writable(descriptor: int) -> None:
    """Wait until writing to ``descriptor`` would not; at once for a regular file."""
    loop = asyncio.get_running_loop()
    await _wait(descriptor, loop.add_writer, loop.remove_writer)


async def _wait(
    descriptor: int,
    add: Callable[..., None],
    remove: Callable[[int], bool],
) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    try:
        add(descriptor, _settle, ready)
    except PermissionError:
        return  # a regular file, which never waits
    try:
        await ready
    finally:
        remove(descriptor)


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
