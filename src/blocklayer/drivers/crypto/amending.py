"""Changing key slots as ``amend`` asks: which slots are meant, what is refused, in which order.

1. Everything that can be refused is refused before anything changes.
2. Without ``force``, the last slot that opens the volume is never erased, and none that is in use
   is overwritten.
3. A slot that is overwritten by force is not the only one at any moment: a free slot, if there is
   one, has the new passphrase meanwhile.
"""

from __future__ import annotations

from blocklayer.codec.luks import SLOT_COUNT
from blocklayer.drivers.crypto.keys import KeySlots
from blocklayer.drivers.crypto.options import SlotChange, checked_time
from blocklayer.errors import UsageError
from blocklayer.graph.objects import Objects


async def amend_slots(
    slots: KeySlots, key: bytearray, change: SlotChange, objects: Objects, *, force: bool
) -> None:
    """Carry out ``change``; ``key`` is the master key."""
    if change.keyslot is not None and not 0 <= change.keyslot < SLOT_COUNT:
        raise UsageError(
            f"Invalid keyslot {change.keyslot} specified, must be between 0 and {SLOT_COUNT - 1}"
        )
    await slots.reload()
    if change.state == "active":
        await _activate(slots, key, change, objects, force)
    else:
        await _erase(slots, change, objects, force)


async def _activate(
    slots: KeySlots, key: bytearray, change: SlotChange, objects: Objects, force: bool
) -> None:
    if not change.new_secret:
        raise UsageError("'new-secret' is required to activate a keyslot")
    if change.old_secret is not None:
        raise UsageError("'old-secret' must not be given when activating keyslots")
    free = [index for index in range(SLOT_COUNT) if index not in slots.active]
    index = change.keyslot
    if index is None:
        if not free:
            raise UsageError("Can't add a keyslot - all keyslots are in use")
        index = free[0]
    elif index not in free and not force:
        raise UsageError(f"Refusing to overwrite active keyslot {index} - please erase it first")
    passphrase = objects.secret(change.new_secret).passphrase
    time_ms = checked_time(change.iter_time)
    spare = free[0] if index not in free and free else None
    if spare is not None:
        await slots.set(spare, key, passphrase, time_ms)
    await slots.set(index, key, passphrase, time_ms)
    if spare is not None:
        await slots.erase(spare)


async def _erase(slots: KeySlots, change: SlotChange, objects: Objects, force: bool) -> None:
    if change.new_secret is not None:
        raise UsageError("'new-secret' must not be given when erasing keyslots")
    if change.iter_time is not None:
        raise UsageError("'iter-time' must not be given when erasing keyslots")
    index = change.keyslot
    old = None
    if change.old_secret is not None:
        old = objects.secret(change.old_secret).passphrase
    if index is None and old is None:
        raise UsageError(
            "To erase keyslot(s), either explicit keyslot index or the password currently "
            "contained in them must be given"
        )
    if index is None:
        assert old is not None
        chosen = await _matching(slots, old, force)
    else:
        chosen = [index]
        await _check_one(slots, index, old, force)
    for one in chosen:
        await slots.erase(one)


async def _matching(slots: KeySlots, old: bytes, force: bool) -> list[int]:
    chosen = await slots.matching(old)
    if not chosen:
        raise UsageError("No keyslots match given (old) password for erase operation")
    if chosen == slots.active and not force:
        raise UsageError(
            "All the active keyslots match the (old) password that was given and erasing them "
            "will erase all the data in the image irreversibly - refusing operation"
        )
    return chosen


async def _check_one(slots: KeySlots, index: int, old: bytes | None, force: bool) -> None:
    active = index in slots.active
    if old is not None and (not active or await slots.open_slot(index, old) is None):
        raise UsageError(
            f"Given keyslot {index} doesn't contain the given old password for erase operation"
        )
    if force:
        # Also one that is inactive: its key material may still be to be overwritten.
        return
    if not active:
        raise UsageError(f"Given keyslot {index} is already erased (inactive)")
    if slots.active == [index]:
        raise UsageError(
            f"Attempt to erase the only active keyslot {index} which will erase all the data in "
            "the image irreversibly - refusing operation"
        )
