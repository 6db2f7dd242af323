"""`blk img bench`: how long many requests take."""

from __future__ import annotations

import os
import time
from typing import Annotated, Final

from blocklayer.api.disk import CACHE_MODES
from blocklayer.api.results import Benched
from blocklayer.cli import console
from blocklayer.cli.common import (
    FILENAME,
    Cache,
    ForceShare,
    Format,
    ImageOpts,
    Output,
    ProgressStyle,
    Quiet,
    count_argument,
    one_filename,
    open_disk,
    say_result,
    size_argument,
)
from blocklayer.cli.options import Command, Option
from blocklayer.errors import BlockError, UsageError
from blocklayer.jobs.bench import Load, bench

_MOST: Final = (1 << 31) - 1
_BACKENDS: Final = ("threads", "native", "io_uring")


class Bench(Command):
    """Measure how long many requests take"""

    OPERANDS = (FILENAME,)
    EXAMPLE = ("-c 1000 -d 16 -s 64k disk.qcow2", "a thousand reads of 64 KiB, 16 at a time")

    quiet: Quiet = False
    output: Output = "human"
    progress: ProgressStyle = None
    format: Format = None
    image_opts: ImageOpts = False
    cache: Cache = "writeback"
    count: Annotated[str, Option("number of requests (default 75000)", "c", "COUNT")] = "75000"
    depth: Annotated[str, Option("requests in flight (default 64)", "d", "DEPTH")] = "64"
    offset: Annotated[str, Option("where the first request begins", "o", "OFFSET")] = "0"
    buffer_size: Annotated[str, Option("size of a request (default 4096)", "s", "BUFFER_SIZE")] = (
        "4096"
    )
    step_size: Annotated[
        str, Option("from one request to the next (default the buffer size)", "S", "STEP_SIZE")
    ] = "0"
    write: Annotated[bool, Option("write instead of reading", "w")] = False
    pattern: Annotated[str, Option("the byte to write (default 0)", value="PATTERN")] = "0"
    flush_interval: Annotated[
        str, Option("flush after this number of writes", value="FLUSH_INTERVAL")
    ] = "0"
    no_drain: Annotated[bool, Option("do not wait for pending requests before flushing")] = False
    aio: Annotated[
        str,
        Option(f"I/O backend ({', '.join(_BACKENDS)}): taken, all use threads", "i", "AIO"),
    ] = "threads"
    native: Annotated[bool, Option("the same as --aio=native", "n")] = False
    force_share: ForceShare = False

    async def run(self) -> int:
        load = self._load()
        name = one_filename(self.operands)
        self._check_combinations(name, load)
        disk = await open_disk(
            name,
            format=self.format,
            image_opts=self.image_opts,
            writable=self.write,
            force_share=self.force_share,
            cache=self.cache,
            quiet=self.quiet,
        )
        try:
            if self.output == "human":
                _announce(load)
            start_s = time.perf_counter()
            try:
                with console.Progress(None if self.quiet else self.progress) as progress:
                    await bench(disk.root, load, lambda done: progress.update(done, load.count))
                    progress.update(load.count, load.count)
            except BlockError as error:
                console.error(str(error))
                raise error.reworded(f"Failed request: {os.strerror(error.errno)}") from error
            taken_s = time.perf_counter() - start_s
        finally:
            await disk.close()
        if self.output == "json":
            say_result(_result(name, load, taken_s))
        else:
            console.say(f"Run completed in {taken_s:.3f} seconds.")
        return 0

    def left_behind(self) -> str:
        return f"'{self.operands[0]}' is valid, and written to in part" if self.write else ""

    def _load(self) -> Load:
        size = size_argument(self.buffer_size, "buffer size", 1, _MOST)
        pattern = count_argument(self.pattern, "pattern byte", 0, 255)
        return Load(
            count=count_argument(self.count, "request count", 1, _MOST),
            depth=count_argument(self.depth, "queue depth", 1, _MOST),
            size=size,
            offset=size_argument(self.offset, "offset"),
            step=size_argument(self.step_size, "step size", 0, _MOST) or size,
            pattern=pattern if self.write else None,
            flush_interval=count_argument(self.flush_interval, "flush interval", 0, _MOST),
            drain=not self.no_drain,
        )

    def _check_combinations(self, name: str, load: Load) -> None:
        if self.cache not in CACHE_MODES:
            raise UsageError("Invalid cache mode")
        if self.aio not in _BACKENDS:
            raise UsageError(f"Invalid aio option: {self.aio}")
        if load.flush_interval and not self.write:
            raise UsageError("--flush-interval is only available in write tests")
        if load.flush_interval and load.flush_interval < load.depth:
            raise UsageError("Flush interval can't be smaller than depth")
        direct = CACHE_MODES[self.cache][1]
        if (self.native or self.aio == "native") and not direct:
            raise UsageError(
                f"Could not open '{name}': aio=native was specified, but it requires "
                "cache.direct=on, which was not specified."
            )


def _announce(load: Load) -> None:
    console.say(
        f"Sending {load.count} {'read' if load.pattern is None else 'write'} requests, {load.size} "
        f"bytes each, {load.depth} in parallel "
        f"(starting at offset {load.offset}, step size {load.step})"
    )
    if load.flush_interval:
        console.say(f"Sending flush every {load.flush_interval} requests")


def _result(name: str, load: Load, taken_s: float) -> Benched:
    per_second = load.count / max(taken_s, 1e-9)
    return Benched(
        filename=name,
        write=load.pattern is not None,
        count=load.count,
        buffer_size=load.size,
        depth=load.depth,
        offset=load.offset,
        step_size=load.step,
        flush_interval=load.flush_interval,
        seconds=round(taken_s, 6),
        requests_per_second=round(per_second, 1),
        bytes_per_second=round(per_second * load.size, 1),
    )
