"""The watcher over a keeper: engines that stand still are replaced, and their requests go on."""

import asyncio
import os
import signal
from collections.abc import Callable

import pytest
from samples import SETTINGS
from test_keeper import Clients, Ladder, answer, generate, make_keeper
from test_orphans import started

from deployments import processes
from deployments.engines.fake import FakeEngine, Script
from deployments.engines.protocol import LoadFailed, Measurement
from deployments.errors import LadderExhausted
from deployments.keeper import Keeper
from deployments.life import Life
from deployments.oom import Cause, Death
from deployments.supervisor import State
from deployments.watchdog import Patience
from deployments.watcher import Watcher

SOON = Patience(stopped_s=0.05, stall_s=0.05, load_s=600.0)
NEVER = Patience(stopped_s=600.0, stall_s=600.0, load_s=600.0)


def watch(keeper: Keeper, patience: Patience) -> Watcher:
    watcher = Watcher(keeper, patience, tick_s=0.01)
    watcher.start()
    return watcher


def new_life() -> Life:
    return Life(1, lambda *_: None, lambda *_: None)


def causes(keeper: Keeper) -> list[Cause]:
    return [a.death.cause for a in keeper.supervisor.attempts if a.death is not None]


class SilentEngine(FakeEngine):
    """Its first life takes requests and does no more; `process_ids` are what it says it has."""

    process_ids: tuple[int, ...] = ()

    async def _run(self, *args: object) -> None:
        if len(self.lives) > 1:
            await super()._run(*args)  # type: ignore[arg-type]

    async def measure(self) -> Measurement:
        return Measurement(resident_bytes=0, device_bytes=0, process_ids=self.process_ids)


@pytest.fixture
def silent(ladder: Ladder) -> Callable[[Clients], Keeper]:
    def make(clients: Clients) -> Keeper:
        keeper = make_keeper(ladder, clients, Script())
        engine = SilentEngine()
        keeper.engine = keeper._handover._engine = engine
        return keeper

    return make


async def test_an_engine_that_takes_requests_and_no_step_is_replaced_with_its_settings(
    silent: Callable[[Clients], Keeper],
) -> None:
    clients = Clients()
    keeper = silent(clients)
    await keeper.start()
    watcher = watch(keeper, SOON)
    await generate(keeper, "a")
    await clients.until(lambda: clients.finished == {"a"})
    assert clients.tokens == {"a": answer("a")}
    assert causes(keeper) == [Cause.STALLED]
    assert [attempt.rung for attempt in keeper.supervisor.attempts] == ["user", "user"]
    await watcher.stop()
    await keeper.stop()


@pytest.mark.parametrize("is_marked", [True, False])
async def test_an_engine_with_a_stopped_process_is_replaced(
    silent: Callable[[Clients], Keeper], is_marked: bool
) -> None:
    owner = processes.identity(os.getpid()) if is_marked else ""
    process = started({**os.environ, processes.OWNER: owner})
    os.kill(process.pid, signal.SIGSTOP)
    try:
        clients = Clients()
        keeper = silent(clients)
        if not is_marked:
            keeper.engine.process_ids = (process.pid,)  # type: ignore[attr-defined]
        await keeper.start()
        watcher = watch(keeper, Patience(stopped_s=0.05, stall_s=600.0, load_s=600.0))
        await clients.until(lambda: causes(keeper)[:1] == [Cause.STALLED])
        assert f"process {process.pid}" in str(keeper.supervisor.attempts[0].death)
        await watcher.stop()
        await keeper.stop()
    finally:
        process.kill()
        process.wait()


async def test_a_healthy_engine_is_left_alone(ladder: Ladder) -> None:
    clients = Clients()
    keeper = make_keeper(ladder, clients, Script())
    await keeper.start()
    watcher = watch(keeper, SOON)
    await generate(keeper, "a", 200)
    await clients.until(lambda: clients.finished == {"a"})
    assert causes(keeper) == []
    await watcher.stop()
    await keeper.stop()


async def test_a_load_that_never_ends_is_ended(ladder: Ladder) -> None:
    clients = Clients()
    keeper = make_keeper(ladder, clients, Script(load_s=3600.0))
    patience = Patience(stopped_s=600.0, stall_s=600.0, load_s=0.02)
    watcher = watch(keeper, patience)
    with pytest.raises(LadderExhausted, match="load_s"):
        await keeper.start()
    assert keeper.state is State.FAILED
    assert set(causes(keeper)) == {Cause.STALLED}
    assert len(causes(keeper)) == 3  # the first, and two restarts
    await watcher.stop()


async def test_a_load_ends_with_its_own_death_or_with_the_one_it_is_given() -> None:
    engine = FakeEngine(Script(load_s=3600.0))
    death = Death(cause=Cause.STALLED, phase="loading", message="too long")
    life = new_life()

    async def start() -> None:
        life.end(death)
        await engine.start(SETTINGS, None)  # type: ignore[arg-type]

    with pytest.raises(LoadFailed, match="too long"):
        await life.load(start())
    own = LoadFailed(Death(cause=Cause.OTHER, phase="loading", message="its own"))

    async def fail() -> None:
        raise own

    with pytest.raises(LoadFailed, match="its own"):
        await new_life().load(fail())


async def test_an_engine_that_stands_still_before_it_was_measured_is_replaced(
    ladder: Ladder,
) -> None:
    """A stopped actor answers nothing: the watcher may not wait for what it holds."""

    class Mute(SilentEngine):
        async def measure(self) -> Measurement:
            await asyncio.Event().wait()
            raise AssertionError

    clients = Clients()
    keeper = make_keeper(ladder, clients, Script())
    keeper.engine = keeper._handover._engine = Mute()
    await keeper.start()
    await generate(keeper, "a")
    watcher = watch(keeper, SOON)
    await clients.until(lambda: clients.finished == {"a"})
    assert causes(keeper) == [Cause.STALLED]
    await watcher.stop()
    await keeper.stop()


async def test_stopping_does_not_raise_what_ended_the_watcher(ladder: Ladder) -> None:
    """Who stops it has an engine to end after that."""

    class Broken(SilentEngine):
        async def measure(self) -> Measurement:
            raise RuntimeError("a bug")

    clients = Clients()
    keeper = make_keeper(ladder, clients, Script())
    keeper.engine = keeper._handover._engine = Broken()
    await keeper.start()
    watcher = watch(keeper, SOON)
    assert watcher._ticker._task is not None
    await asyncio.wait((watcher._ticker._task,), timeout=5)
    assert watcher._ticker._task.done()
    await watcher.stop()
    await keeper.stop()
