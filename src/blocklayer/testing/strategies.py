"""Hypothesis strategies: shapes of images, chains of them, and requests that hit their borders.

1. Everything drawn is small enough to be kept as plain bytes, whatever the cluster size: most
   images have tiny clusters, a few have large ones and hardly any data.
2. Offsets and lengths lie on, or one byte or sector beside, what matters to a driver: clusters,
   what one L2 table covers, the ends of the disk and of the layers below it.
3. Values shrink to the plainest case: version 3, 64 KiB clusters, one layer, few requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from hypothesis import strategies as st

from blocklayer.testing.model import Chain
from blocklayer.units import KIB, MIB, SECTOR, align_up


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """How an image is made; names are those of ``-o``."""

    size: int
    cluster_size: int = 64 * KIB
    refcount_bits: int = 16
    compat: str = "1.1"
    lazy_refcounts: bool = False
    extended_l2: bool = False

    def options(self) -> dict[str, object]:
        """The options of ``-o``, but for the size."""
        options: dict[str, object] = {"cluster_size": self.cluster_size, "compat": self.compat}
        if self.compat != "0.10":
            options |= {"refcount_bits": self.refcount_bits, "lazy_refcounts": self.lazy_refcounts}
        if self.extended_l2:
            options["extended_l2"] = True
        return options

    def option_text(self) -> str:
        """The options as one argument of ``-o``."""
        return ",".join(
            f"{name}={('on' if value else 'off') if isinstance(value, bool) else value}"
            for name, value in self.options().items()
        )


class Request(msgspec.Struct, frozen=True):
    """One request of a guest; ``kind`` is write, zero, unmap, discard or compress."""

    kind: str
    offset: int
    length: int
    fill: int = 0

    @property
    def data(self) -> bytes:
        """What is written: compressible, and different in every 512 bytes."""
        pattern = bytes([self.fill]) * (SECTOR - 1)
        pieces = [bytes([at & 0xFF]) + pattern for at in range(0, self.length // SECTOR + 1)]
        return b"".join(pieces)[: self.length] if self.fill else bytes(self.length)

    def command(self) -> str:
        """The ``qemu-io`` command; its data are ``length`` times the byte ``fill``."""
        place = f"{self.offset} {self.length}"
        return {
            "write": f"write -q -P {self.fill} {place}",
            "zero": f"write -q -z {place}",
            "unmap": f"write -q -z -u {place}",
            "discard": f"discard -q {place}",
            "compress": f"write -q -c -P {self.fill} {place}",
        }[self.kind]

    def flat(self) -> bytes:
        """The data that ``command`` writes."""
        return bytes([self.fill]) * self.length

    def apply(self, chain: Chain, data: bytes | None = None) -> None:
        """Do the same to the model; ``data`` None means ``self.data``."""
        if self.kind in ("write", "compress"):
            chain.write(self.offset, self.data if data is None else data)
        elif self.kind == "discard":
            chain.discard(self.offset, self.length)
        else:
            chain.zero(self.offset, self.length)


_SMALL_CLUSTERS = (512, 1024, 2048, 4096)
_LARGE_CLUSTERS = (64 * KIB, 8 * KIB, 16 * KIB, 32 * KIB, 128 * KIB, 512 * KIB, MIB, 2 * MIB)
_EXTENDED_CLUSTERS = (16 * KIB, 16 * KIB, 64 * KIB)
"""Those with 32 subclusters, of 512 bytes and more."""
_REFCOUNT_BITS = (16, 1, 2, 4, 8, 32, 64)

SMALL_DISK = 96 * KIB
"""Disks with small clusters are no larger; they have hundreds of clusters and several L2 tables."""


def cluster_sizes(*, large: bool = True) -> st.SearchStrategy[int]:
    """Cluster sizes from 512 bytes to 2 MiB, the small ones more often."""
    small = st.sampled_from(_SMALL_CLUSTERS)
    if not large:
        return small
    return st.one_of(*[small] * 5, st.sampled_from(_LARGE_CLUSTERS))


@st.composite
def sizes(
    draw: st.DrawFn, cluster_size: int, *, granularity: int = SECTOR, limit: int | None = None
) -> int:
    """Sizes of disks: whole clusters, or a sector or some bytes more or less than that."""
    most = max(limit or SMALL_DISK, cluster_size)
    clusters = draw(st.integers(1, max(2, most // cluster_size)))
    beside = draw(st.sampled_from((0, SECTOR, -SECTOR, 3 * SECTOR, 1, -1)))
    size = clusters * cluster_size + beside
    return max(granularity, align_up(min(size, most), granularity))


@st.composite
def shapes(
    draw: st.DrawFn,
    *,
    large: bool = True,
    size: int | None = None,
    granularity: int = SECTOR,
) -> Shape:
    """Shapes of qcow2 images: both versions, every cluster size and refcount width."""
    extended_l2 = draw(st.integers(0, 3)) == 3
    cluster_size = draw(
        st.sampled_from(_EXTENDED_CLUSTERS) if extended_l2 else cluster_sizes(large=large)
    )
    if size is None:
        size = draw(sizes(cluster_size, granularity=granularity))
    if not extended_l2 and draw(st.integers(0, 3)) == 3:
        return Shape(size=size, cluster_size=cluster_size, compat="0.10")
    return Shape(
        size=size,
        cluster_size=cluster_size,
        refcount_bits=draw(st.sampled_from(_REFCOUNT_BITS)),
        lazy_refcounts=draw(st.integers(0, 5)) == 5,
        extended_l2=extended_l2,
    )


@st.composite
def chains(draw: st.DrawFn, *, layers: int = 6, large: bool = True) -> list[Shape]:
    """Chains of 1 to ``layers`` images, the base first, larger or smaller than what is below."""
    count = draw(st.integers(1, layers))
    return [draw(shapes(large=large)) for _ in range(count)]


def borders(shape: Shape, below: Sequence[int] = ()) -> list[int]:
    """Offsets within the disk at which something changes for its driver."""
    cluster = shape.cluster_size
    per_table = cluster // 8 * cluster
    places = {0, cluster, 2 * cluster, per_table, shape.size, align_up(shape.size, cluster)}
    places |= {shape.size - cluster, shape.size // 2 // cluster * cluster, *below}
    if shape.extended_l2:
        places |= {cluster // 32, cluster // 8, cluster + cluster // 2, 2 * cluster - cluster // 32}
    return sorted(place for place in places if 0 <= place <= shape.size)


@st.composite
def ranges(
    draw: st.DrawFn, shape: Shape, below: Sequence[int] = (), *, granularity: int = 1
) -> tuple[int, int]:
    """A range within the disk, not empty: (offset, length)."""
    near = st.sampled_from((0, 0, 0, 1, -1, SECTOR, -SECTOR, 3 * SECTOR))
    place = st.one_of(
        st.builds(int.__add__, st.sampled_from(borders(shape, below)), near),
        st.integers(0, shape.size),
    )
    one, other = sorted((draw(place), draw(place)))
    one = min(max(0, one), shape.size - 1) // granularity * granularity
    other = min(shape.size, align_up(max(other, one + 1), granularity))
    # Whole disks are drawn often enough by the borders; keep the rest short.
    if draw(st.booleans()):
        other = min(other, align_up(one + shape.cluster_size + 1, granularity))
    return one, other - one


@st.composite
def requests(
    draw: st.DrawFn,
    shape: Shape,
    below: Sequence[int] = (),
    *,
    kinds: Sequence[str] = ("write", "write", "zero", "unmap", "discard", "compress"),
    granularity: int = 1,
) -> Request:
    """A request to an image of ``shape`` that lies over layers of the sizes ``below``."""
    kind = draw(st.sampled_from(kinds))
    if kind != "compress":
        offset, length = draw(ranges(shape, below, granularity=granularity))
        return Request(kind, offset, length, draw(st.integers(1, 255)) if kind == "write" else 0)
    cluster = shape.cluster_size
    offset = draw(st.integers(0, (shape.size - 1) // cluster)) * cluster
    return Request(kind, offset, min(cluster, shape.size - offset), draw(st.integers(1, 255)))


def request_lists(
    shape: Shape, below: Sequence[int] = (), *, most: int = 12, granularity: int = 1
) -> st.SearchStrategy[list[Request]]:
    """Lists of requests to one image."""
    return st.lists(requests(shape, below, granularity=granularity), max_size=most)
