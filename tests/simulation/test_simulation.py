"""Live jobs, snapshots, bitmaps, failures and crashes beside guests, in simulated time."""

from __future__ import annotations

import asyncio
import re

import pytest

from blocklayer.errors import BlockError
from blocklayer.testing.simulation import DeadlockError, simulate
from simulation.world import World

SEEDS = 16
SOAK_SEEDS = 4000
FOREVER_S = 200
"""Of simulated time."""


def play(seed: int, length: int) -> list[str]:
    """Run the world of `seed`; what happened."""
    world = World(seed)

    async def main() -> None:
        async with asyncio.timeout(FOREVER_S):
            await world.run(length=length)

    try:
        simulate(main())
    except BaseException as error:
        # pytest shows this: play(seed, length) replays it.
        error.add_note(f"seed {seed}, length {length}, until then: {world.outcomes}")
        raise
    return world.outcomes


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nothing_is_lost(seed: int) -> None:
    play(seed, 4)


def masked(outcomes: list[str]) -> list[str]:
    """Without the numbers of disks, which go on from run to run."""
    return [re.sub(r"crashing:\d+|'cra?s?h?i?n?g?:?\d*$|of 'c.*", "", each) for each in outcomes]


def test_a_seed_is_a_run() -> None:
    assert masked(play(5, 3)) == masked(play(5, 3))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(SEEDS, SOAK_SEEDS))
def test_nothing_is_lost_for_long(seed: int) -> None:
    play(seed, 10)


def test_a_deadlock_is_told() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError, match=r"Nothing is left.*[\s\S]*in main") as told:
        simulate(main())
    assert isinstance(told.value, BlockError)
