"""Claims serialise what meets and nothing else; epochs know when freed space is out of use."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.graph.request import Claim, Claims, Epochs
from graph.toys import run


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


class Worker:
    """Holds a claim until told to end."""

    def __init__(self, claims: Claims, start: int, end: int) -> None:
        self.end = asyncio.Event()
        self.inside = False
        self.task = asyncio.ensure_future(self._work(claims.claim(start, end)))

    async def _work(self, claim: Claim) -> None:
        async with claim:
            self.inside = True
            await self.end.wait()
        self.inside = False

    async def finish(self) -> None:
        self.end.set()
        await self.task


def test_ranges_that_meet_wait_in_order_of_arrival() -> None:
    async def main() -> None:
        claims = Claims()
        first, other = Worker(claims, 0, 10), Worker(claims, 20, 30)
        both, last = Worker(claims, 5, 25), Worker(claims, 9, 10)
        await settle()
        assert [w.inside for w in (first, other, both, last)] == [True, True, False, False]
        await first.finish()
        await settle()
        # `last` meets `both`, which came earlier and still waits for `other`.
        assert [both.inside, last.inside] == [False, False]
        await other.finish()
        await settle()
        assert [both.inside, last.inside] == [True, False]
        await both.finish()
        await last.finish()
        assert claims.held == []

    run(main())


def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    async def main() -> None:
        claims = Claims()
        holder, waiter, behind = Worker(claims, 0, 4), Worker(claims, 0, 4), Worker(claims, 2, 4)
        await settle()
        waiter.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter.task
        await settle()
        assert not behind.inside
        await holder.finish()
        await settle()
        assert behind.inside
        await behind.finish()
        assert claims.held == []

    run(main())


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 10), st.integers(0, 3)),
        min_size=2,
        max_size=12,
    )
)
def test_no_two_claims_that_meet_are_ever_held_at_once(ranges: list[tuple[int, int, int]]) -> None:
    async def main() -> None:
        claims = Claims()
        held: list[tuple[int, int]] = []
        order: list[int] = []

        async def work(number: int, start: int, end: int, turns: int) -> None:
            async with claims.claim(start, end):
                assert all(end <= s or e <= start for s, e in held)
                held.append((start, end))
                order.append(number)
                for _ in range(turns):
                    await asyncio.sleep(0)
                held.remove((start, end))

        await asyncio.gather(
            *(
                work(number, start, start + length, turns)
                for number, (start, length, turns) in enumerate(ranges)
            )
        )
        assert sorted(order) == list(range(len(ranges)))
        assert claims.held == []

    run(main())


def test_epochs_pass_when_all_that_began_before_have_ended() -> None:
    epochs = Epochs()
    old = epochs.enter()
    freed = epochs.retire()
    young = epochs.enter()
    assert not epochs.passed(freed)
    epochs.leave(young)
    assert not epochs.passed(freed)
    young = epochs.enter()
    epochs.leave(old)
    assert epochs.passed(freed)
    later = epochs.retire()
    assert not epochs.passed(later)
    epochs.leave(young)
    assert epochs.passed(later)
