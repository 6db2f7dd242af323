"""The same requests, once through qemu-io and once through us, leave images that map alike."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from effort import examples
from oracles import Oracle
from qcow2.images import opened, run

CLUSTER = 4096
CLUSTERS = 256
SIZE = CLUSTER * CLUSTERS - 1536

requests = st.lists(
    st.tuples(
        st.sampled_from(("write", "write -z", "write -z -u", "write -c", "discard", "flush")),
        st.integers(0, CLUSTERS - 1),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=20,
)


async def ours(path: Path, steps: list[Any], options: dict[str, Any]) -> None:
    async with opened(path, **options) as root:
        for number, (verb, start, length) in enumerate(steps):
            if verb == "write":
                await root.write(start, bytes([number + 1]) * length)
            elif verb == "write -c":
                await root.write_compressed(start, bytes([number + 1]) * length)
            elif verb == "discard":
                await root.discard(start, length)
            elif verb == "flush":
                await root.flush()
            else:
                await root.write_zeroes(start, length, unmap=verb.endswith("-u"))


def theirs(path: Path, steps: list[Any], options: dict[str, Any], qemu_io: Oracle) -> None:
    commands: list[str] = []
    for number, (verb, start, length) in enumerate(steps):
        pattern = f"-P {number + 1} " if verb in ("write", "write -c") else ""
        tail = "" if verb == "flush" else f" {pattern}{start} {length}"
        commands += ["-c", verb + tail]
    text = "".join(
        f",{name.replace('_', '-')}={'on' if v else 'off'}" for name, v in options.items()
    )
    image = f"driver=qcow2,file.filename={path},discard=unmap{text}"
    qemu_io(*commands, "--image-opts", image)


def places(steps: list[Any]) -> list[Any]:
    """Whole clusters; a compressed write goes to one cluster that is not in use (QEMU's rule)."""
    used: set[int] = set()
    ready = []
    for verb, first, count in steps:
        count = 1 if verb == "write -c" else min(count, CLUSTERS - first)
        touched = set(range(first, first + count))
        if verb == "write -c" and touched & used:
            continue
        if verb == "write -c" and first == CLUSTERS - 1:
            continue
        used |= touched if verb != "flush" else set()
        end = min((first + count) * CLUSTER, SIZE)
        ready.append((verb, first * CLUSTER, end - first * CLUSTER))
    return ready


def mapped(path: Path, qemu_img: Oracle) -> list[dict[str, Any]]:
    """The map without host offsets, runs that differ in them alone put together."""
    runs: list[dict[str, Any]] = []
    for run_ in qemu_img.json("map", "--output=json", path):
        run_["offset"] = "offset" in run_
        same = runs and all(
            runs[-1][key] == run_[key] for key in run_ if key not in ("start", "length")
        )
        if same:
            runs[-1]["length"] += run_["length"]
        else:
            runs.append(run_)
    return runs


@settings(max_examples=examples(8))
@given(st.sampled_from(("0.10", "1.1")), st.booleans(), st.sampled_from((False, True)), requests)
def test_maps_are_alike(
    qemu_img: Oracle, qemu_io: Oracle, compat: str, backed: bool, keep: bool, steps: list[Any]
) -> None:
    options = {"discard_no_unref": keep} if compat == "1.1" else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        how: list[Any] = ["-o", f"cluster_size={CLUSTER},compat={compat}"]
        if backed:
            qemu_img("create", "-q", "-f", "qcow2", folder / "base", str(SIZE))
            qemu_io("-f", "qcow2", "-c", "write -P 200 0 500k", folder / "base")
            how += ["-b", folder / "base", "-F", "qcow2"]
        for path in (folder / "ours", folder / "theirs"):
            qemu_img("create", "-q", "-f", "qcow2", *how, path, str(SIZE))
        ready = places(steps)
        run(ours(folder / "ours", ready, options))
        theirs(folder / "theirs", ready, options, qemu_io)
        assert mapped(folder / "ours", qemu_img) == mapped(folder / "theirs", qemu_img)
        qemu_img("compare", folder / "ours", folder / "theirs")
        assert "No errors" in qemu_img("check", folder / "ours").stdout
