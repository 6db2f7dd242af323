"""`blk img chain`: the images below an image, and what merging them would move."""

from __future__ import annotations

import msgspec

from blocklayer.api import layers
from blocklayer.cli import console
from blocklayer.cli.common import (
    FILENAME,
    ForceShare,
    Format,
    ImageOpts,
    Output,
    one_filename,
    open_disk,
)
from blocklayer.cli.options import Command


class Chain(Command):
    """Draw an image's backing chain, and what commits and streams would move

    Data that would be read and written count as moved; zeros are only noted.
    """

    OPERANDS = (FILENAME,)
    EXAMPLE = (
        "top.qcow2",
        "the layers of top.qcow2, what each holds, and what a commit would move",
    )

    format: Format = None
    image_opts: ImageOpts = False
    force_share: ForceShare = False
    output: Output = "human"

    @property
    def writes(self) -> bool:
        return False

    async def run(self) -> int:
        disk = await open_disk(
            one_filename(self.operands),
            format=self.format,
            image_opts=self.image_opts,
            force_share=self.force_share,
            one_pass=True,
        )
        async with disk:
            found = await layers.chain(disk.root.node)
        if self.output == "json":
            from blocklayer.cli.json_text import pretty

            console.say(pretty(msgspec.to_builtins(found)))
            return 0
        from blocklayer.cli.picture import terminal

        text = terminal.draw_chain(found, terminal.width(), coloured=terminal.takes_colours())
        console.write(text)
        return 0
