"""Run-time options of a qcow2 node: as given, and as they come out for one image.

1. A combination that QEMU refuses is refused, in the same words.
2. ``Settings`` holds numbers ready for use; nothing else looks at ``Qcow2Options``.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType

from blocklayer.codec.qcow2.geometry import Geometry
from blocklayer.codec.qcow2.header import COMPATIBLE_LAZY_REFCOUNTS, ImageHeader
from blocklayer.drivers.qcow2 import overlap
from blocklayer.drivers.qcow2.encryption import EncryptOptions
from blocklayer.errors import UsageError
from blocklayer.graph.node import Flags
from blocklayer.graph.options import NodeOptions, Reference, Size
from blocklayer.units import MIB, div_up, is_power_of_two

_DEFAULT_L2_CACHE_SIZE: Final = 32 * MIB
_ONE_PASS_L2_CACHE_SIZE: Final = MIB
_DEFAULT_CLEAN_INTERVAL_S: Final = 600
_DEFAULT_ENTRY_SIZE: Final = 4096
_MIN_ENTRY_SIZE: Final = 512
_MIN_L2_ENTRIES: Final = 2
_MIN_REFCOUNT_CLUSTERS: Final = 4


class Qcow2Options(NodeOptions):
    """What a qcow2 node takes besides the generic members."""

    file: Reference = ""
    backing: Reference | UnsetType | None = UNSET
    data_file: Reference | UnsetType = UNSET
    lazy_refcounts: bool | UnsetType = UNSET
    pass_discard_request: bool | UnsetType = UNSET
    pass_discard_snapshot: bool = True
    pass_discard_other: bool = False
    discard_no_unref: bool = False
    encrypt: EncryptOptions | UnsetType = UNSET
    overlap_check: str | dict[str, Any] | UnsetType = UNSET
    cache_size: Size | UnsetType = UNSET
    l2_cache_size: Size | UnsetType = UNSET
    l2_cache_entry_size: Size | UnsetType = UNSET
    refcount_cache_size: Size | UnsetType = UNSET
    cache_clean_interval: Annotated[int, Meta(ge=0, lt=1 << 31)] | UnsetType = UNSET


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The options in force for one image."""

    lazy_refcounts: bool
    discard_request: bool
    discard_snapshot: bool
    discard_other: bool
    discard_no_unref: bool
    overlap_kinds: int
    slice_size: int
    """Bytes of one L2 slice."""
    slices_max: int
    refcount_blocks_max: int
    clean_interval_s: int

    @classmethod
    def make(
        cls, options: Qcow2Options, flags: Flags, header: ImageHeader, geometry: Geometry
    ) -> Settings:
        """Raises UsageError for what cannot be had together, or not with this image."""
        lazy = bool(header.compatible_features & COMPATIBLE_LAZY_REFCOUNTS)
        if options.lazy_refcounts is not UNSET:
            lazy = options.lazy_refcounts
        if lazy and header.version < 3:
            raise UsageError(
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"
            )
        if options.discard_no_unref and header.version < 3:
            raise UsageError("discard-no-unref is only supported since qcow2 version 3")
        slice_size = _slice_size(options, geometry)
        default = _ONE_PASS_L2_CACHE_SIZE if flags.one_pass else _DEFAULT_L2_CACHE_SIZE
        l2_size, refcount_size = _cache_sizes(options, header, geometry, slice_size, default)
        request = options.pass_discard_request
        interval = options.cache_clean_interval
        return cls(
            lazy_refcounts=lazy,
            discard_request=flags.discard_unmap if request is UNSET else request,
            discard_snapshot=options.pass_discard_snapshot,
            discard_other=options.pass_discard_other,
            discard_no_unref=options.discard_no_unref,
            overlap_kinds=_overlap_kinds(options.overlap_check),
            slice_size=slice_size,
            slices_max=max(_MIN_L2_ENTRIES, l2_size // slice_size),
            refcount_blocks_max=max(_MIN_REFCOUNT_CLUSTERS, refcount_size >> geometry.cluster_bits),
            clean_interval_s=_DEFAULT_CLEAN_INTERVAL_S if interval is UNSET else interval,
        )


def _slice_size(options: Qcow2Options, geometry: Geometry) -> int:
    size = options.l2_cache_entry_size
    if size is UNSET:
        return min(_DEFAULT_ENTRY_SIZE, geometry.cluster_size)
    if not (_MIN_ENTRY_SIZE <= size <= geometry.cluster_size and is_power_of_two(size)):
        raise UsageError(
            f"L2 cache entry size must be a power of two between {_MIN_ENTRY_SIZE} and the cluster "
            f"size ({geometry.cluster_size})"
        )
    return size


def _cache_sizes(
    options: Qcow2Options,
    header: ImageHeader,
    geometry: Geometry,
    slice_size: int,
    default_l2_size: int,
) -> tuple[int, int]:
    """Bytes for L2 slices and for refcount blocks."""
    total, l2, refcount = options.cache_size, options.l2_cache_size, options.refcount_cache_size
    tables = div_up(header.size, geometry.cluster_size) * geometry.l2_entry_size
    # More than the image's tables take is of no use.
    useful = max(div_up(tables, slice_size) * slice_size, _MIN_L2_ENTRIES * slice_size)
    least = _MIN_REFCOUNT_CLUSTERS * geometry.cluster_size
    if total is UNSET:
        l2_size = min(useful, default_l2_size if l2 is UNSET else l2)
        return l2_size, least if refcount is UNSET else refcount
    if l2 is not UNSET and refcount is not UNSET:
        raise UsageError(
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
        )
    if l2 is not UNSET:
        if l2 > total:
            raise UsageError("l2-cache-size may not exceed cache-size")
        return min(useful, l2), total - l2
    if refcount is not UNSET:
        if refcount > total:
            raise UsageError("refcount-cache-size may not exceed cache-size")
        return min(useful, total - refcount), refcount
    if total >= useful + least:
        return useful, total - useful
    refcount_size = min(total, least)
    return total - refcount_size, refcount_size


def _overlap_kinds(given: str | dict[str, Any] | UnsetType) -> int:
    """The kinds of structures to guard: a template, changed by single flags."""
    if given is UNSET:
        return overlap.TEMPLATES["cached"]
    flags: dict[str, Any] = {}
    template = given
    if not isinstance(given, str):
        flags = {**given}
        template = flags.pop("template", "cached")
    if template not in overlap.TEMPLATES:
        raise UsageError(
            f"Unsupported value '{template}' for qcow2 option 'overlap-check'. Allowed are any of "
            "the following: none, constant, cached, all"
        )
    kinds = overlap.TEMPLATES[template]
    for name, value in flags.items():
        if name not in overlap.KINDS:
            raise UsageError(f"Parameter 'overlap-check.{name}' is unexpected")
        if value in (True, "on", "yes", "true", "y"):
            kinds |= overlap.KINDS[name]
        elif value in (False, "off", "no", "false", "n"):
            kinds &= ~overlap.KINDS[name]
        else:
            raise UsageError(f"Parameter 'overlap-check.{name}' expects 'on' or 'off'")
    return kinds
