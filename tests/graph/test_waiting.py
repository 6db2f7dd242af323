"""Waiting: in place, on a loop, and for threads that must have ended."""

from __future__ import annotations

import asyncio
import threading

import pytest

from blocklayer.graph import waiting


def test_in_place_calls_without_a_thread() -> None:
    async def main() -> int:
        assert waiting.in_place()
        return await waiting.offload(threading.get_ident)

    loop = asyncio.new_event_loop()
    try:
        assert waiting.run(main(), loop) == threading.get_ident()
    finally:
        loop.close()


def test_a_coroutine_that_suspends_ends_on_the_loop() -> None:
    async def main() -> int:
        before = waiting.in_place()
        await asyncio.sleep(0)
        assert before
        assert not waiting.in_place()
        return await waiting.offload(threading.get_ident)

    loop = asyncio.new_event_loop()
    try:
        assert waiting.run(main(), loop) != threading.get_ident()
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


def test_errors_pass_through_a_coroutine_that_suspended() -> None:
    async def main() -> None:
        try:
            await asyncio.wait_for(asyncio.get_running_loop().create_future(), 0)
        except TimeoutError:
            raise ValueError("timed out") from None

    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(ValueError, match="timed out"):
            waiting.run(main(), loop)
    finally:
        loop.close()


def test_the_synchronous_api_is_refused_inside_its_own_requests() -> None:
    loop = asyncio.new_event_loop()

    async def inner() -> None:
        return None

    async def outer() -> None:
        nested = inner()
        try:
            waiting.run(nested, loop)
        finally:
            nested.close()

    try:
        with pytest.raises(RuntimeError, match="from inside"):
            waiting.run(outer(), loop)
    finally:
        loop.close()


def test_a_caller_inside_a_loop_of_its_own_is_served() -> None:
    async def sleeper() -> str:
        await asyncio.sleep(0)
        return "done"

    async def main() -> str:
        loop = asyncio.new_event_loop()
        try:
            found = waiting.run(sleeper(), loop)
        finally:
            loop.close()
        await asyncio.sleep(0)
        return found

    assert asyncio.run(main()) == "done"


def test_a_cancelled_caller_waits_for_its_thread() -> None:
    began, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        assert go_on.wait(30)
        ended.set()

    async def main() -> None:
        task = asyncio.create_task(waiting.offload(work))
        await asyncio.to_thread(began.wait, 30)
        task.cancel()
        await asyncio.sleep(0)
        # A second cancellation must not make it give up either.
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(main())
