"""`check` finds in broken images what qemu-img finds, and `-r` repairs them.

What is compared with qemu-img: corruptions, leaks, the statistics and the exit class; and the text,
where one fault was made on purpose.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from blocklayer.codec.qcow2.entries import COPIED
from blocklayer.drivers.qcow2.recount import COPIED_REFERENCE, SHARED_REFERENCE, Recount
from effort import examples
from oracles import Oracle
from qcow2.broken import FAULTS, Broken, check, compare_reports, exit_class, sample


@pytest.mark.parametrize("fault", FAULTS)
def test_says_what_they_say(image: Broken, fault: str, tmpfs: Path, qemu_img: Oracle) -> None:
    path = tmpfs / "x.qcow2"
    FAULTS[fault](image)
    path.write_bytes(image.content)
    compare_reports(path, qemu_img, text=True)
    assert path.read_bytes() == image.content, "a check without repair writes nothing"


def test_bitmaps_are_counted(tmpfs: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    path = tmpfs / "x.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    for name in ("one", "two"):
        qemu_img("bitmap", "--add", path, name)
    qemu_io("-f", "qcow2", "-c", "write 0 1M", path)
    report = compare_reports(path, qemu_img)
    assert report is not None
    assert exit_class(report) == 0
    # Without its autoclear bit the extension means nothing, and what it points at is lost.
    image = Broken(path.read_bytes())
    image.put(88, 0)
    path.write_bytes(image.content)
    report = compare_reports(path, qemu_img)
    assert report is not None
    assert report.leaks == 5


@given(
    st.lists(
        st.tuples(
            st.integers(0, 4000), st.sampled_from([1, 1, 1, 5, 64, 1024, 3000]), st.booleans()
        ),
        max_size=150,
    )
)
def test_recount_counts(runs: list[tuple[int, int, bool]]) -> None:
    recount, model = Recount(), Counter[int]()
    for cluster, count, copied in runs:
        flag = COPIED_REFERENCE if copied else SHARED_REFERENCE
        if count == 1:
            recount.add_all([cluster], flag)
        else:
            recount.add_run(cluster, count, flag)
        model.update(range(cluster, cluster + count))
    assert all(recount.get(cluster) == model[cluster] for cluster in range(8000))
    assert recount.end == max(model, default=-1) + 1
    for limit in (1, 3, 70):
        assert recount.above(limit) == sorted(
            (cluster, count) for cluster, count in model.items() if count > limit
        )


@st.composite
def faults(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """(table, index, bits to flip), small indexes and telling bits first."""
    bits = st.one_of(
        st.sampled_from([COPIED, 1 << 62, 1, 0x200, 1 << 56, 1 << 16, 1 << 18, 1 << 30, 1 << 9]),
        st.integers(0, 63).map(lambda bit: 1 << bit),
    )
    table = st.sampled_from(["L1", "L2", "L2", "L2", "refcounts", "refcounts", "refcount table"])
    return draw(st.lists(st.tuples(table, st.integers(0, 70), bits), min_size=1, max_size=4))


def break_it(image: Broken, broken: list[tuple[str, int, int]]) -> None:
    places = {
        "L1": (image.l1, image.header.l1_size),
        "L2": (image.l2(), image.header.cluster_size // 8),
        "refcounts": (image.refcount_block, image.header.cluster_size // 8),
        "refcount table": (image.refcount_table, image.header.cluster_size // 8),
    }
    for table, index, bits in broken:
        offset, entries = places[table]
        image.flip(offset + 8 * (index % entries), bits)


@given(
    broken=faults(),
    cluster_size=st.sampled_from([512, 4096, 65536]),
    refcount_bits=st.sampled_from([1, 2, 8, 16, 32, 64]),
    snapshot=st.booleans(),
)
# One reference too many for the width of refcounts hides, and must not hide what follows from it.
@example(broken=[("L1", 8, 1 << 9)], cluster_size=512, refcount_bits=1, snapshot=False)
@example(broken=[("refcount table", 0, 1 << 9)], cluster_size=512, refcount_bits=1, snapshot=False)
# Past the end of the file, and nothing else is wrong.
@example(
    broken=[("L2", 4, COPIED), ("L2", 4, 1 << 20)],
    cluster_size=65536,
    refcount_bits=1,
    snapshot=False,
)
# A table whose own refcount cannot be read is left out.
@example(
    broken=[("L2", 0, 1 << 30), ("refcount table", 0, 1 << 63)],
    cluster_size=512,
    refcount_bits=16,
    snapshot=False,
)
# A refcount past the end of the file, in the byte of one that is not.
@example(broken=[("refcounts", 4, COPIED)], cluster_size=4096, refcount_bits=2, snapshot=False)
@settings(
    max_examples=examples(50),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_broken_anyhow(
    tmpfs: Path,
    folder: Path,
    qemu_img: Oracle,
    qemu_io: Oracle,
    broken: list[tuple[str, int, int]],
    cluster_size: int,
    refcount_bits: int,
    snapshot: bool,
) -> None:
    snapshot = snapshot and refcount_bits >= 8
    path = tmpfs / "x.qcow2"
    image = Broken(sample(qemu_img, qemu_io, folder, cluster_size, refcount_bits, snapshot))
    break_it(image, broken)
    path.write_bytes(image.content)
    found = compare_reports(path, qemu_img)
    if found is None:
        return
    repaired, messages, _ = check(path, "all")
    after = compare_reports(path, qemu_img)
    assert after is not None
    assert after.corruptions == repaired.corruptions
    # A broken L1 entry may take the header, or a refcount block, for an L2 table: what that refers
    # to changes with every repair.
    assert not repaired.leaks or any(table == "L1" for table, _, _ in broken), messages
