"""The model: what a guest must see of a chain, kept as plain bytes, and what a crash may leave.

1. A layer either holds a byte or does not; what it does not hold comes from the layer below, and is
   zero past that layer's end. Bytes are held singly: clusters are the driver's affair, and must not
   show.
2. A discarded byte reads as what it was or as zero, and stays so: the first look (``settle``)
   decides. It never reads as what a lower layer holds under it.
3. Growing gives bytes that read as zeros, whatever a lower layer holds there. What a shrink cut off
   never comes back.
4. After a power failure each sector holds what it held at the end of the last flush, or what any
   later request, ended or not, made of it (``Versions``); the size is one of theirs as well.
"""

from __future__ import annotations

from blocklayer.units import SECTOR

_HELD = 0xFF


class Layer:
    """One layer of a chain: its bytes, and which of them it holds."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        """Zero where nothing is held."""
        self.held = bytearray(size)
        """0xFF where the layer holds the byte, else 0."""
        self.doubt = bytearray(size)
        """Not 0 where the byte was discarded, and nobody has looked since."""

    @property
    def size(self) -> int:
        """Bytes the layer shows."""
        return len(self.data)

    def store(self, offset: int, data: bytes) -> None:
        """Hold ``data`` at ``offset``."""
        end = offset + len(data)
        self.data[offset:end] = data
        self.held[offset:end] = bytes([_HELD]) * len(data)
        self.doubt[offset:end] = bytes(len(data))

    def resize(self, size: int) -> None:
        """Cut off the tail, or grow by zeros that this layer holds."""
        grown = size - self.size
        del self.data[size:], self.held[size:], self.doubt[size:]
        if grown > 0:
            self.data += bytes(grown)
            self.held += bytes([_HELD]) * grown
            self.doubt += bytes(grown)

    def over(self, below: bytes) -> bytes:
        """What is seen of this layer where it lies over a layer that shows ``below``."""
        size = self.size
        under = int.from_bytes(below[:size], "little")
        hidden = int.from_bytes(self.held, "little")
        seen = int.from_bytes(self.data, "little") | (under & ~hidden)
        return seen.to_bytes(size, "little")

    def drop(self) -> None:
        """Hold nothing."""
        self.data = bytearray(self.size)
        self.held = bytearray(self.size)
        self.doubt = bytearray(self.size)


class Chain:
    """A chain of layers, the base first; requests go to the last one."""

    def __init__(self, *sizes: int) -> None:
        self.layers = [Layer(size) for size in sizes]

    @property
    def top(self) -> Layer:
        """The active layer."""
        return self.layers[-1]

    @property
    def size(self) -> int:
        """Bytes the guest sees."""
        return self.top.size

    def visible(self, depth: int = 0) -> bytes:
        """All that is seen of the chain, or of the part ``depth`` layers below its top."""
        seen = b""
        for layer in self.layers[: len(self.layers) - depth]:
            seen = layer.over(seen)
        return seen

    def write(self, offset: int, data: bytes) -> None:
        """The guest wrote."""
        self.top.store(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """The guest asked for zeros."""
        self.top.store(offset, bytes(length))

    def discard(self, offset: int, length: int) -> None:
        """The guest has no more use for the range."""
        self.top.doubt[offset : offset + length] = bytes([_HELD]) * length

    def resize(self, size: int) -> None:
        """The disk was resized."""
        self.top.resize(size)

    def settle(self, actual: bytes) -> None:
        """Compare with all that is read of the disk; raises AssertionError at the first difference.

        From then on what was discarded is what it was seen to be.
        """
        top, expected = self.top, self.visible()
        assert len(actual) == len(expected), f"size is {len(actual)}, not {len(expected)}"
        for start in range(0, self.size, SECTOR):
            sector = slice(start, start + SECTOR)
            if any(top.doubt[sector]) and actual[sector] != expected[sector]:
                for offset, doubtful in enumerate(top.doubt[sector], start):
                    if doubtful and not actual[offset]:
                        top.store(offset, b"\0")
        top.doubt = bytearray(self.size)
        if actual != self.visible():
            raise AssertionError(difference(actual, self.visible()))

    def commit(self) -> None:
        """The top's bytes moved into the layer below, which grew if it was smaller."""
        top, below = self.layers[-1], self.layers[-2]
        seen = self.visible()
        if below.size < top.size:
            below.resize(top.size)
        beyond = self.visible(1)[top.size :]
        below.store(0, seen + beyond)
        top.drop()

    def rebase(self, *sizes: int) -> None:
        """The layers below the top were exchanged for new ones; the guest sees what it saw."""
        seen = self.visible()
        self.layers[:-1] = [Layer(size) for size in sizes]
        self.top.store(0, seen)


class Versions:
    """Every content of a disk that may be found after a power failure (rule 4)."""

    def __init__(self, content: bytes) -> None:
        self.states = [content]

    def begin(self, content: bytes) -> None:
        """A request begins that will leave ``content``: from now on any part may be on disk."""
        if content != self.states[-1]:
            self.states.append(content)

    def flushed(self) -> None:
        """A flush ended that began when all requests had ended."""
        del self.states[:-1]

    def copy(self) -> Versions:
        """These versions, to be kept while the originals go on."""
        kept = Versions(self.states[0])
        kept.states = list(self.states)
        return kept

    def explain(self, content: bytes, unit: int = SECTOR) -> str | None:
        """Why ``content`` must not be found, or None if it may.

        ``unit`` is what is written as one: after an error, not even sectors need be whole (1).
        """
        if len(content) not in {len(state) for state in self.states}:
            return f"size {len(content)} is none of {sorted({len(s) for s in self.states})}"
        if content in self.states:
            return None
        for offset in range(0, len(content), SECTOR):
            place = slice(offset, min(offset + SECTOR, len(content)))
            held = [state[place].ljust(place.stop - offset, b"\0") for state in self.states]
            found = content[place]
            if found in held or (unit == 1 and _mixed(found, held)):
                continue
            return (
                f"the sector at {offset:#x} holds {_brief(found)}, which is none of "
                + ", ".join(sorted({_brief(sector) for sector in held}))
            )
        return None


def _mixed(found: bytes, held: list[bytes]) -> bool:
    """Whether each byte is that of one of the sectors held."""
    return all(
        byte in of_each for byte, of_each in zip(found, zip(*held, strict=True), strict=True)
    )


def difference(actual: bytes, expected: bytes) -> str:
    """The first byte in which two contents differ, in words."""
    for offset, (found, wanted) in enumerate(zip(actual, expected, strict=False)):
        if found != wanted:
            return f"byte {offset:#x} is {found:#04x}, not {wanted:#04x}"
    return f"size is {len(actual)}, not {len(expected)}"


def _brief(sector: bytes) -> str:
    values = sorted(set(sector))
    return "/".join(f"{value:#04x}" for value in values[:6]) + ("…" if len(values) > 6 else "")
