"""``python -m bench``: run the cases and print what took how long, and the ratios."""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path

from bench.cases import CASES, Case
from bench.measure import Sample, in_turns

PLACES = {"tmpfs": "/dev/shm", "disk": "/var/tmp"}
HEAD = (
    f"{'':33} {'ours':>8} {'peer':>8} {'ratio':>6} {'wanted':>7}   {'cpu':>11} {'memory MiB':>12}"
)


def main() -> int:
    """The exit code says whether every wanted ratio was reached."""
    options = _options()
    short = 0
    for place in options.where.split(","):
        parent = PLACES.get(place, place)
        with tempfile.TemporaryDirectory(prefix="blocklayer-bench-", dir=parent) as name:
            print(f"\n{place}: {parent}, {options.size} MiB of data, median of {options.runs}")
            print(HEAD)
            for case in CASES:
                if re.search(options.only, case.name):
                    short += not _run(case, Path(name), options.size << 20, options.runs)
    print(f"\n{short} ratios fall short" if short else "\nall ratios are as wanted")
    return 1 if short else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--size", type=int, default=2048, help="MiB of data in an image")
    parser.add_argument("--runs", type=int, default=3, help="runs of each command")
    parser.add_argument(
        "--where", default="tmpfs,disk", help="tmpfs, disk or folders, separated by commas"
    )
    parser.add_argument("--only", default="", help="cases whose name this expression finds")
    return parser.parse_args()


def _run(case: Case, folder: Path, size: int, runs: int) -> bool:
    """Measure one case and print its line; False if it falls short."""
    # In a process of its own: what this one uses of memory would count as its children's.
    if not (child := os.fork()):
        case.prepare(folder, size)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"the images for '{case.name}' could not be made")
    # What preparing wrote must not be on its way to the disk while others are measured.
    os.sync()

    def clear() -> None:
        if case.made is not None:
            (folder / case.made).unlink(missing_ok=True)

    # This tree is measured, whichever one is installed.
    root = Path(__file__).parent.parent
    os.environ["PYTHONPATH"] = os.pathsep.join((str(root / "src"), str(root)))
    ours, peer = in_turns([case.ours, case.peer], folder, case.runs or runs, clear)
    clear()
    ratio = ours.wall_s / peer.wall_s
    good = ratio <= case.most
    print(
        f"{case.name:33} {_time(ours)} {_time(peer)} {ratio:6.2f} {case.most:7.2f} "
        f"{'  ' if good else '! '}{ours.cpu_s:5.2f} {peer.cpu_s:5.2f} "
        f"{ours.memory_kib >> 10:6} {peer.memory_kib >> 10:5}",
        flush=True,
    )
    return good


def _time(sample: Sample) -> str:
    return f"{sample.wall_s:7.3f}s"


if __name__ == "__main__":
    raise SystemExit(main())
