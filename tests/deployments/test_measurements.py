import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from samples import KILLED
from test_openai_harness import until

from deployments.engines.fake import FakeEngine
from deployments.engines.protocol import Measurement, TokenRequest
from deployments.errors import EngineDied
from deployments.keeper import Keeper
from deployments.measurements import Measurements
from deployments.policy import fixed
from deployments.restarts import RestartLimit
from deployments.supervisor import Supervisor
from vram.ladder import Rung

Ladder = Callable[[int], tuple[Rung, ...]]


class MeasuredEngine(FakeEngine):
    """Each measurement waits for `gate` and is one byte larger, or fails with `error`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.num_measured = 0

    async def measure(self) -> Measurement:
        self.num_measured += 1
        number = self.num_measured
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return Measurement(resident_bytes=number, device_bytes=0, process_ids=())


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def engine() -> MeasuredEngine:
    return MeasuredEngine()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def keeper(ladder: Ladder, engine: MeasuredEngine) -> AsyncIterator[Keeper[TokenRequest]]:
    supervisor = Supervisor(
        ladder(0)[0], fixed(ladder), RestartLimit(max_restarts=2, window_s=600.0)
    )
    keeper = Keeper(
        "demo", engine, supervisor, on_step=lambda step: None, on_give_up=lambda error: None
    )
    await keeper.start()
    yield keeper
    await keeper.stop()


@pytest.fixture
def measurements(keeper: Keeper[TokenRequest], clock: Clock) -> Measurements:
    return Measurements(keeper, every_s=10.0, clock=clock)


async def resident_bytes(measurements: Measurements) -> int | None:
    newest = await measurements.refreshed()
    return None if newest is None else newest.measurement.resident_bytes


async def test_the_first_one_is_waited_for(measurements: Measurements) -> None:
    newest = await measurements.refreshed()
    assert newest is not None
    assert (newest.measurement.resident_bytes, newest.at_s) == (1, 1000.0)


async def test_a_young_one_is_told_again(
    measurements: Measurements, engine: MeasuredEngine, clock: Clock
) -> None:
    await measurements.refreshed()
    clock.now_s += 10
    assert await resident_bytes(measurements) == 1
    assert engine.num_measured == 1


async def test_an_old_one_is_told_at_once_while_the_next_is_on_its_way(
    measurements: Measurements, engine: MeasuredEngine, clock: Clock
) -> None:
    await measurements.refreshed()
    engine.gate.clear()
    clock.now_s += 11
    assert await resident_bytes(measurements) == 1
    assert await resident_bytes(measurements) == 1
    await asyncio.sleep(0)
    assert engine.num_measured == 2
    engine.gate.set()
    await until(lambda: measurements.newest is not None and measurements.newest.at_s == 1011.0)
    assert await resident_bytes(measurements) == 2


async def test_an_engine_that_dies_meanwhile_leaves_the_last_one(
    measurements: Measurements, engine: MeasuredEngine, clock: Clock
) -> None:
    await measurements.refreshed()
    engine.error = EngineDied("gone")
    clock.now_s += 11
    for _ in range(3):
        assert await resident_bytes(measurements) == 1
        await asyncio.sleep(0)


async def test_an_engine_that_dies_at_the_first_one_has_none(
    measurements: Measurements, engine: MeasuredEngine
) -> None:
    engine.error = EngineDied("gone")
    assert await resident_bytes(measurements) is None
    engine.error = None
    assert await resident_bytes(measurements) == 2


async def test_what_was_counted_while_the_engine_died_is_thrown_away(
    measurements: Measurements, engine: MeasuredEngine, keeper: Keeper[TokenRequest], clock: Clock
) -> None:
    """vLLM's processes are looked for: of a dead engine there are none, which is no measurement."""
    await measurements.refreshed()
    engine.gate.clear()
    clock.now_s += 11
    await measurements.refreshed()
    await asyncio.sleep(0)
    engine.die(KILLED)
    engine.gate.set()
    await until(lambda: keeper.is_serving and keeper.supervisor.generation == 2)
    assert await resident_bytes(measurements) == 1


async def test_a_new_life_is_measured_without_a_wait(
    measurements: Measurements, engine: MeasuredEngine, keeper: Keeper[TokenRequest]
) -> None:
    await measurements.refreshed()
    engine.die(KILLED)
    assert await resident_bytes(measurements) == 1
    assert engine.num_measured == 1  # there is nothing to measure while it recovers
    await until(lambda: keeper.is_serving and keeper.supervisor.generation == 2)
    assert await resident_bytes(measurements) == 1
    await until(lambda: measurements.newest is not None and measurements.newest.generation == 2)


async def test_a_client_that_leaves_does_not_end_the_measurement_of_another(
    measurements: Measurements, engine: MeasuredEngine
) -> None:
    engine.gate.clear()
    leaves = asyncio.create_task(measurements.refreshed())
    stays = asyncio.create_task(measurements.refreshed())
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.sleep(0)
    engine.gate.set()
    newest = await stays
    assert newest is not None
    assert engine.num_measured == 1


async def test_a_bug_in_it_is_heard_by_whoever_asks_next(
    measurements: Measurements, engine: MeasuredEngine, clock: Clock
) -> None:
    await measurements.refreshed()
    engine.error = RuntimeError("a bug")
    clock.now_s += 11
    await measurements.refreshed()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="a bug"):
        await measurements.refreshed()
    engine.error = None
    assert await resident_bytes(measurements) == 1


async def test_a_bug_in_it_does_not_make_the_replica_unhealthy(
    measurements: Measurements, engine: MeasuredEngine
) -> None:
    """Ray Serve ends a replica, with its streams, after three failed checks of its health."""
    engine.error = RuntimeError("a bug")
    for _ in range(3):
        measurements.watch()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert engine.num_measured >= 2
