"""`blk nbd --list`: what another server exports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklayer.cli import console
from blocklayer.cli.objects import new_graph
from blocklayer.codec.addresses import UnixSocketAddress
from blocklayer.codec.nbd.constants import Mode, TransmissionFlag
from blocklayer.codec.nbd.records import Offer
from blocklayer.drivers.nbd.connection import list_exports as ask
from blocklayer.errors import UsageError
from blocklayer.graph.tls_credentials import TlsCredentials

if TYPE_CHECKING:
    from blocklayer.cli.nbd.main import Nbd

_FLAGS = {
    TransmissionFlag.READ_ONLY: "readonly",
    TransmissionFlag.SEND_FLUSH: "flush",
    TransmissionFlag.SEND_FUA: "fua",
    TransmissionFlag.ROTATIONAL: "rotational",
    TransmissionFlag.SEND_TRIM: "trim",
    TransmissionFlag.SEND_WRITE_ZEROES: "zeroes",
    TransmissionFlag.SEND_DF: "df",
    TransmissionFlag.CAN_MULTI_CONN: "multi",
    TransmissionFlag.SEND_RESIZE: "resize",
    TransmissionFlag.SEND_CACHE: "cache",
    TransmissionFlag.SEND_FAST_ZERO: "fast-zero",
    TransmissionFlag.BLOCK_STATUS_PAYLOAD: "block-status-payload",
}
_SIZES = {Mode.EXTENDED: "64-bit", Mode.STRUCTURED: "32-bit"}


async def list_exports(command: Nbd) -> int:
    """Print every export of the server, as the original tool does."""
    context = None
    address = command.address()
    hostname = command.tls_hostname
    if command.tls_creds is not None:
        found = new_graph().objects.find(command.tls_creds)
        if found is None or not isinstance(found[1], TlsCredentials):
            raise UsageError(
                f"Failed to get TLS creds: No TLS credentials with id '{command.tls_creds}'"
            )
        context = found[1].client_context()
        if hostname is None and not isinstance(address, UnixSocketAddress):
            hostname = command.bind
    offers, mode = await ask(address, tls=context, hostname=hostname)
    console.say(f"exports available: {len(offers)}")
    for offer in offers:
        console.say("\n".join(_lines(offer, mode)))
    return 0


def _lines(offer: Offer, mode: Mode) -> list[str]:
    lines = [f" export: '{_plain(offer.name)}'"]
    if offer.description:
        lines.append(f"  description: {_plain(offer.description)}")
    if not offer.flags:
        return lines
    names = " ".join(name for flag, name in _FLAGS.items() if flag in offer.flags)
    sizes = offer.block_sizes
    lines += [
        f"  size:  {offer.size}",
        f"  flags: {int(offer.flags):#x} ( {names} )",
        f"  min block: {sizes.minimum}",
        f"  opt block: {sizes.preferred}",
        f"  max block: {sizes.maximum}",
    ]
    if mode in _SIZES:
        lines.append(f"  transaction size: {_SIZES[mode]}")
        lines.append(f"  available meta contexts: {len(offer.contexts)}")
        lines += [f"   {_plain(name)}" for name in offer.contexts]
    return lines


def _plain(text: str) -> str:
    """A server's words, fit for a terminal."""
    return "".join(each if each.isprintable() else "?" for each in text)
