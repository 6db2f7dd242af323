"""throttle: limits, bursts, turns and drains, on a clock that only moves when everybody waits."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from blocklayer.drivers import REGISTRY
from blocklayer.errors import UsageError
from blocklayer.graph import edit
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_options
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.graph.throttling import ThrottleGroup, ThrottleLimits
from blocklayer.units import KIB, MIB


class _NoWait(selectors.SelectSelector):
    """Instead of waiting, time passes."""

    passed_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if not found and timeout:
            self.passed_s += timeout
        return found


class FastLoop(asyncio.SelectorEventLoop):
    """A loop on which sleeping takes no time."""

    def __init__(self) -> None:
        self._no_wait = _NoWait()
        super().__init__(self._no_wait)

    def time(self) -> float:
        return self._no_wait.passed_s


def play(scene: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=FastLoop) as runner:
        runner.run(scene())  # type: ignore[arg-type]


def limits(**values: int) -> dict[str, int]:
    return {name.replace("_", "-"): value for name, value in values.items()}


async def attach(graph: Graph, name: str, group: str = "g") -> Root:
    options = {
        "driver": "throttle", "node-name": name, "throttle-group": group,
        "file": {"driver": "memory", "size": 16 * MIB},
    }  # fmt: skip
    node = await open_options(graph, options, Flags(read_only=False))
    return Root(node, "the guest", Permission.CONSISTENT_READ | Permission.WRITE)


async def took_s(*works: Awaitable[object]) -> float:
    start = asyncio.get_running_loop().time()
    await asyncio.gather(*works)
    return asyncio.get_running_loop().time() - start


async def many(root: Root, count: int, length: int = 512, *, write: bool = False) -> None:
    for _ in range(count):
        await (root.write(0, b"x" * length) if write else root.read(0, length))


@pytest.mark.parametrize(
    ("given", "count", "length", "write", "expected_s"),
    [
        (limits(iops_total=10), 100, 512, False, 10),
        (limits(iops_write=10), 100, 512, False, 0),
        (limits(iops_write=10), 100, 512, True, 10),
        (limits(iops_read=20, iops_write=10), 100, 512, False, 5),
        (limits(bps_total=MIB), 100, 64 * KIB, True, 6.25),
        (limits(bps_total=MIB, iops_total=1000), 100, 64 * KIB, True, 6.25),
        (limits(iops_total=100, iops_size=4096), 100, 16 * KIB, False, 4),
        # 100 a second until 200 more have passed than 10 a second allow; then 10 a second.
        (limits(iops_total=10, iops_total_max=100, iops_total_max_length=2), 250, 512, False, 4.9),
    ],
)
def test_requests_keep_to_the_limits(
    given: dict[str, int], count: int, length: int, write: bool, expected_s: float
) -> None:
    async def scene() -> None:
        graph = Graph(REGISTRY)
        graph.objects.add("throttle-group", "g", {"limits": given})
        root = await attach(graph, "n")
        took = await took_s(many(root, count, length, write=write))
        assert took == pytest.approx(expected_s, rel=0.05, abs=0.3)

    play(scene)


def test_members_share_and_take_turns() -> None:
    async def scene() -> None:
        graph = Graph(REGISTRY)
        graph.objects.add("throttle-group", "g", {"limits": limits(iops_total=10)})
        greedy, modest = await attach(graph, "greedy"), await attach(graph, "modest")
        ended: dict[str, float] = {}

        async def client(name: str, root: Root, count: int) -> None:
            await many(root, count)
            ended[name] = asyncio.get_running_loop().time()

        await asyncio.gather(
            *(client("greedy", greedy, 10) for _ in range(20)), client("modest", modest, 50)
        )
        # Half of what passes is the other's, however many wait.
        assert ended["modest"] == pytest.approx(10, rel=0.1)
        assert ended["greedy"] == pytest.approx(25, rel=0.1)

    play(scene)


def test_a_drain_lets_everything_pass() -> None:
    async def scene() -> None:
        graph = Graph(REGISTRY)
        graph.objects.add("throttle-group", "g", {"limits": limits(iops_total=1)})
        root = await attach(graph, "n")
        waiting = [asyncio.ensure_future(root.read(0, 512)) for _ in range(100)]
        await asyncio.sleep(0)
        async with edit.changing(graph):
            assert asyncio.get_running_loop().time() == 0
        assert all(one.done() for one in waiting)
        # What passed counts: the next has to wait for all of it.
        assert await took_s(root.read(0, 512)) == pytest.approx(100, rel=0.1)

    play(scene)


def test_limits_can_be_changed_while_requests_wait() -> None:
    async def scene() -> None:
        graph = Graph(REGISTRY)
        graph.objects.add("throttle-group", "g", {"limits": limits(iops_total=1)})
        _, group = graph.objects.find("g") or (None, None)
        assert isinstance(group, ThrottleGroup)
        assert group.shown()["limits"]["iops-total"] == 1
        root = await attach(graph, "n")
        work = asyncio.ensure_future(many(root, 1000))
        await asyncio.sleep(5)
        group.change("limits", limits(iops_total=100))
        assert await took_s(work) == pytest.approx(10, rel=0.1)
        with pytest.raises(UsageError, match="iops size requires"):
            group.change("limits", limits(iops_size=512))
        assert group.limits.iops_total == 100
        group.set_limits(ThrottleLimits())
        assert await took_s(many(root, 1000)) == 0
        assert group.in_use
        with pytest.raises(UsageError):
            graph.objects.remove("g")
        await root.close()
        graph.objects.remove("g")

    play(scene)


def test_a_request_that_is_given_up_holds_nobody_up() -> None:
    async def scene() -> None:
        graph = Graph(REGISTRY)
        graph.objects.add("throttle-group", "g", {"limits": limits(iops_total=1)})
        root = await attach(graph, "n")
        await root.read(0, 512)
        given_up = asyncio.ensure_future(root.read(0, 512))
        next_one = asyncio.ensure_future(root.read(0, 512))
        await asyncio.sleep(0)
        given_up.cancel()
        assert await took_s(next_one) < 1.2

    play(scene)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (limits(iops_total=100, iops_read=10), "bps/iops/max total values and read/write values"),
        (limits(bps_total_max=10), "bps_max/iops_max require corresponding bps/iops values"),
        (limits(bps_total=100, bps_total_max=10), "bps_max/iops_max cannot be lower than bps/iops"),
        (limits(bps_total=100, bps_total_max_length=10), "burst length set without burst rate"),
        (
            limits(bps_total=100, bps_total_max=200, bps_total_max_length=0),
            "the burst length cannot be 0",
        ),
        (limits(bps_total=-1), r"bps/iops/max values must be within \[0, 1000000000000000\]"),
        (limits(iops_size=4096), "iops size requires an iops value to be set"),
        (
            limits(bps_total=100, bps_total_max=200, bps_total_max_length=10_000_000_000),
            r"bps-total-max-length value must be in the range \[0, 4294967295\]",
        ),
        (limits(nonsense=1), "nonsense"),
    ],
)
def test_limits_that_make_no_sense(given: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Graph(REGISTRY).objects.add("throttle-group", "g", {"limits": given})


def test_a_group_must_exist() -> None:
    async def scene() -> None:
        graph = Graph(REGISTRY)
        graph.objects.add("secret", "s", {"data": "x"})
        for name in ("nope", "s"):
            with pytest.raises(UsageError, match=f"Throttle group '{name}' does not exist"):
                await attach(graph, "n", name)
        assert not graph.nodes

    asyncio.run(scene())
