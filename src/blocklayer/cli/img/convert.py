"""`blk img convert`: images of any format, one after the other, into one of any other.

1. Everything that can be refused is refused before the target is touched.
2. ``-`` is standard input, raw, or standard output (``cli.img.piped``); ``./-`` is a file.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated

import msgspec

from blocklayer.api.convert import converted
from blocklayer.api.disk import Disk
from blocklayer.api.results import Converted
from blocklayer.api.stream import image_stream
from blocklayer.api.target import Unfinished, check_distinct, create_target, encrypted_target
from blocklayer.cli import console
from blocklayer.cli.common import (
    OPENING,
    ForceShare,
    Output,
    ProgressStyle,
    Quiet,
    Rate,
    cache_option,
    check_cache,
    count_argument,
    open_disk,
    parse_options,
    say_result,
    size_argument,
)
from blocklayer.cli.img.create import check_creatable, options_help
from blocklayer.cli.img.piped import PIPE, check_input, check_output, give, take
from blocklayer.cli.img.snapshot import load_snapshot
from blocklayer.cli.objects import new_graph
from blocklayer.cli.options import Command, Option
from blocklayer.drivers import REGISTRY
from blocklayer.errors import UsageError
from blocklayer.graph.driver import FormatDriver
from blocklayer.graph.graph import Graph
from blocklayer.graph.options import decode
from blocklayer.graph.root import Root
from blocklayer.jobs import convert as job
from blocklayer.jobs.copying import DEFAULT_WORKERS, CopyOptions
from blocklayer.jobs.plan import sparse_size_error
from blocklayer.jobs.streaming import StreamOptions

_MOST_WORKERS = 16
_SPARSE_SIZE = "4k"


class Convert(Command):
    """Copy images, one after the other, to a new one of any format

    Interrupted, a target that this made is removed; one that existed is left incomplete.
    """

    OPERANDS = (
        ("SRC_FILENAME", "the image to copy; - reads a raw image from standard input"),
        ("[SRC_FILENAME2…]", "further sources, which follow the first"),
        (
            "TGT_FILENAME",
            "the image to make; - writes a raw, qcow2 or vmdk image to standard output",
        ),
    )
    EXAMPLE = ("-p -c -O qcow2 disk.raw small.qcow2", "a compressed copy, with progress shown")

    quiet: Quiet = False
    output: Output = "human"
    progress: ProgressStyle = None
    source_format: Annotated[
        str | None,
        Option(
            "format of the sources, else it is guessed",
            "f",
            "FMT",
            also=("format",),
            group=OPENING,
        ),
    ] = None
    image_opts: Annotated[
        bool,
        Option(
            "sources are lists of options, driver=…,file.filename=… (incompatible with -f)",
            also=("source-image-opts",),
            group=OPENING,
        ),
    ] = False
    snapshot: Annotated[
        str | None,
        Option(
            "copy this internal snapshot of the source: snapshot.id=ID,snapshot.name=NAME, or "
            "either of them alone",
            "l",
            "SNAPSHOT",
            also=("source-snapshot",),
        ),
    ] = None
    source_cache: Annotated[str, cache_option("T", what=" of the sources")] = "writeback"
    target_format: Annotated[
        str | None,
        Option("format of the target (default raw)", "O", "FMT", also=("output-format",)),
    ] = None
    target_image_opts: Annotated[
        bool,
        Option("TGT_FILENAME is a list of options (needs -n; incompatible with -O)", group=OPENING),
    ] = False
    target_options: Annotated[
        list[str],
        Option(
            "options of the target's format, as name=value,…",
            "o",
            "OPTIONS",
            also=("target-format-options",),
        ),
    ] = msgspec.field(default_factory=list)
    compress: Annotated[bool, Option("compress the target (qcow2 only)", "c")] = False
    compression_level: Annotated[
        str | None,
        Option(
            "how hard to compress: 1 (the fastest, and the default) to 9, for zstd to 19",
            value="LEVEL",
        ),
    ] = None
    target_cache: Annotated[str, cache_option("t", "unsafe", " of the target")] = "unsafe"
    backing: Annotated[
        str | None, Option("make the target an overlay of this image", "Bb", "FILENAME")
    ] = None
    backing_format: Annotated[str | None, Option("format of the backing image", "F", "FMT")] = None
    no_create: Annotated[bool, Option("write to a target that exists already", "n")] = False
    target_is_zero: Annotated[
        bool, Option("the target reads as zeros: do not write zeros to it (needs -n)")
    ] = False
    sparse_size: Annotated[
        str | None,
        Option("zeros of this length or more become holes (default 4k, 0: none)", "S", "SIZE"),
    ] = None
    force_share: ForceShare = False
    rate: Rate = None
    parallel: Annotated[
        str,
        Option(f"chunks in flight, 1 to {_MOST_WORKERS} (default {DEFAULT_WORKERS})", "m", "COUNT"),
    ] = str(DEFAULT_WORKERS)
    oob_writes: Annotated[
        bool, Option("allocate in any order, which may be faster and fragment the target", "W")
    ] = False
    bitmaps: Annotated[bool, Option("copy the persistent bitmaps of the source as well")] = False
    skip_broken_bitmaps: Annotated[
        bool, Option("leave out bitmaps that are inconsistent (needs --bitmaps)")
    ] = False
    copy_range_offloading: Annotated[
        bool,
        Option("taken for old scripts: data goes through memory with or without it", "C"),
    ] = False
    salvage: Annotated[bool, Option("take what cannot be read for zeros, and go on")] = False

    unfinished: Unfinished | None = None

    async def run(self) -> int:
        if parse_options(self.target_options) is None:
            target = self.operands[-1] if self.operands else None
            console.write(options_help(self.target_format or "raw", target))
            return 0
        options = self._copy_options()
        *names, target_name = self.operands if len(self.operands) > 1 else ["", ""]
        if not names or not target_name:
            raise UsageError("Must specify image file name")
        self._check_combinations(names)
        graph = new_graph()
        to_pipe = target_name == PIPE and not self.target_image_opts
        self._check_pipes(names, to_pipe)
        if PIPE in names and not self.image_opts:
            await self._convert_to(target_name, [], options, graph)
            return 0
        async with AsyncExitStack() as opened:
            sources = [
                await opened.enter_async_context(await self._open_source(name, graph))
                for name in names
            ]
            if self.snapshot is not None:
                await load_snapshot([disk.root.node for disk in sources], self.snapshot)
            roots = [disk.root for disk in sources]
            if to_pipe:
                await self._convert_to_pipe(roots, options, graph)
                return 0
            result = await self._convert_to(target_name, roots, options, graph)
        if self.output == "json":
            say_result(result)
        return 0

    async def _open_source(self, name: str, graph: Graph) -> Disk:
        return await open_disk(
            name,
            format=self.source_format,
            image_opts=self.image_opts,
            force_share=self.force_share,
            cache=self.source_cache,
            one_pass=True,
            graph=graph,
        )

    @property
    def _makes_overlay(self) -> bool:
        """Whether the target gets a backing file, by ``-B`` or among its format's options."""
        options = parse_options(self.target_options) or {}
        return bool(self.backing is not None or options.get("backing_file"))

    def left_behind(self) -> str:
        return self.unfinished.left if self.unfinished else ""

    def _copy_options(self) -> CopyOptions:
        """The options of the copy itself. Raises UsageError."""
        text = _SPARSE_SIZE if self.sparse_size is None else self.sparse_size
        sparse_size = size_argument(text, "buffer size for sparse output")
        problem = sparse_size_error(sparse_size)
        if problem:
            raise UsageError(problem)
        if not self.parallel.isdecimal():
            raise UsageError(f"Invalid number of coroutines specified: '{self.parallel}'.")
        count = int(self.parallel)
        if not 1 <= count <= _MOST_WORKERS:
            raise UsageError(
                f"Invalid number of coroutines specified. Must be between 1 and {_MOST_WORKERS}."
            )
        return CopyOptions(
            sparse_size=sparse_size,
            compress=self.compress,
            compression_level=self._level(),
            in_order=not self.oob_writes,
            workers=count,
            bytes_per_s=0 if self.rate is None else size_argument(self.rate, "rate limit"),
            salvage=self._warn if self.salvage else None,
        )

    def _level(self) -> int | None:
        if self.compression_level is None:
            return None
        if not self.compress:
            raise UsageError("--compression-level requires use of -c flag")
        return count_argument(self.compression_level, "compression level", 1, 19)

    def _warn(self, message: str) -> None:
        if not self.quiet:
            console.warning(message)

    def _check_combinations(self, names: list[str]) -> None:
        check_cache(self.target_cache)
        check_cache(self.source_cache, "source cache")
        if self.target_is_zero and not self.no_create:
            raise UsageError("--target-is-zero requires use of -n flag")
        if self.target_image_opts and not self.no_create:
            raise UsageError("--target-image-opts requires use of -n flag")
        if self.target_image_opts and self.target_format is not None:
            raise UsageError("--target-image-opts and -O are mutually exclusive")
        if self.no_create and self.target_options:
            raise UsageError("-o has no effect when skipping image creation")
        if self.no_create and self.backing is not None:
            raise UsageError("Cannot use -B/-b with -n: the target exists already")
        if self.skip_broken_bitmaps and not self.bitmaps:
            raise UsageError("Use of --skip-broken-bitmaps requires --bitmaps")
        if self.bitmaps and len(names) > 1:
            raise UsageError("Copying bitmaps only possible with single source")
        if self._makes_overlay and len(names) > 1:
            raise UsageError(
                "Having a backing file for the target makes no sense when concatenating multiple "
                "input images"
            )
        if self.backing is not None and self.backing_format is None:
            raise UsageError("Use of backing file requires explicit backing format")
        if self.copy_range_offloading and (self.compress or self.sparse_size is not None):
            letter = "c" if self.compress else "S"
            raise UsageError(f"Cannot enable copy offloading when -{letter} is used")
        mode = (parse_options(self.target_options) or {}).get("preallocation", "off")
        if self.compress and mode != "off":
            raise UsageError("Compression and preallocation not supported at the same time")
        if not self.target_image_opts:
            if not self.no_create:
                check_creatable(self.target_format or "raw")
            elif self.target_format not in (None, *REGISTRY.table):
                raise UsageError(f"Unknown file format '{self.target_format}'")
            encrypted = any(
                name.endswith("key-secret") for name in parse_options(self.target_options) or {}
            )
            if self.compress and encrypted:
                raise UsageError(job.COMPRESSED_AND_ENCRYPTED)
            if self.compress and not job.supports_compression(
                REGISTRY.load(self.target_format or "raw")
            ):
                raise UsageError("Compression not supported for this file format")
            level = self._level()
            if level is not None and not self.no_create:
                self._check_level(level)

    def _check_level(self, level: int) -> None:
        """Raise UsageError unless the image to be made takes this compression level."""
        driver = REGISTRY.load(self.target_format or "raw")
        assert issubclass(driver, FormatDriver)
        assert driver.CreateOptions is not None
        values = parse_options(self.target_options) or {}
        chosen = {name: values[name] for name in ("compression_type",) if name in values}
        # A stream takes the levels that a file takes, and looks at them when it is made.
        driver.stream(decode(driver.CreateOptions, chosen), compress=True, level=level)

    def _check_pipes(self, names: list[str], to_pipe: bool) -> None:
        """Raise BlockError for what standard input or output cannot do."""
        from_pipe = PIPE in names and not self.image_opts
        if self.bitmaps and (from_pipe or to_pipe):
            raise UsageError("--bitmaps cannot be used with standard input or output")
        if from_pipe:
            if len(names) > 1 or self._makes_overlay or self.snapshot is not None or to_pipe:
                raise UsageError("standard input can only be the one source of a copy to a file")
            options = None if self.no_create else parse_options(self.target_options) or {}
            check_input(self.source_format, self.target_format or "raw", options)
        if to_pipe:
            if self.output == "json":
                raise UsageError("--output=json cannot be used with standard output as target")
            check_output(self.no_create)

    async def _convert_to_pipe(self, roots: list[Root], options: CopyOptions, graph: Graph) -> None:
        image = await image_stream(
            graph,
            self.target_format or "raw",
            dict(parse_options(self.target_options) or {}),
            job.total_size(roots),
            backing=self.backing,
            backing_format=self.backing_format,
            compress=self.compress,
            compression_level=options.compression_level,
        )
        streamed = StreamOptions(
            sparse_size=None if self.sparse_size is None else options.sparse_size,
            top_only=self._makes_overlay,
            workers=options.workers,
            bytes_per_s=options.bytes_per_s,
            salvage=options.salvage,
        )
        self.unfinished = Unfinished("standard output", created=False, tell=console.warning)
        with self.unfinished:
            await give(roots, image, streamed, None if self.quiet else self.progress)

    async def _convert_to(
        self, name: str, roots: list[Root], options: CopyOptions, graph: Graph
    ) -> Converted:
        """Copy ``roots``, or standard input if there are none, to the image ``name``."""
        if self.bitmaps:
            job.check_bitmaps(roots, skip_broken=self.skip_broken_bitmaps)
        if self.no_create:
            async with await self._open_target(name, graph) as target:
                job.check_target(roots, target.root, compress=self.compress)
                options.zeros_known = self.target_is_zero
                self.unfinished = Unfinished(name, created=False, tell=console.warning)
                with self.unfinished:
                    return await self._copy(name, roots, target, options)
        preallocation = await self._create(name, roots, graph)
        self.unfinished = Unfinished(name, created=True, tell=console.warning)
        with self.unfinished:
            async with await self._open_target(name, graph) as target:
                options.zeros_known = job.reads_zero_when_new(target.root.node, preallocation)
                return await self._copy(name, roots, target, options)

    async def _open_target(self, name: str, graph: Graph) -> Disk:
        format = None if self.target_image_opts else self.target_format or "raw"
        options = parse_options(self.target_options) or {}
        return await open_disk(
            name,
            format=format,
            image=encrypted_target(name, format or "raw", options) or None,
            image_opts=self.target_image_opts,
            writable=True,
            cache=self.target_cache,
            graph=graph,
        )

    async def _copy(
        self, name: str, roots: list[Root], target: Disk, options: CopyOptions
    ) -> Converted:
        if not roots:
            progress_style = None if self.quiet else self.progress
            await take(target.root, options, progress_style, grow=not self.no_create)
            return converted(target, name, target.size)
        if self.bitmaps:
            job.check_bitmap_support(target.root.node)
        total = job.total_size(roots)
        with console.Progress(None if self.quiet else self.progress) as progress:
            covered = await job.convert(
                roots,
                target.root,
                options,
                top_only=self._makes_overlay,
                progress=lambda done: progress.update(done, total),
            )
            progress.update(total, total)
        if self.bitmaps:
            await job.copy_bitmaps(roots[0].node, target.root.node, self._warn)
        return converted(target, name, covered)

    async def _create(self, name: str, sources: list[Root], graph: Graph) -> str:
        """Make the target; the answer is its preallocation mode."""
        check_distinct(sources, name)
        made = await create_target(
            graph,
            name,
            self.target_format or "raw",
            parse_options(self.target_options) or {},
            job.total_size(sources),
            f"converting {self.target_format or 'raw'}",
            backing=self.backing,
            backing_format=self.backing_format,
        )
        return str(getattr(made, "preallocation", "off"))
