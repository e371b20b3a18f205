"""A request that ends every engine it meets: refused in the end, while the others live on."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from samples import KILLED, OUT_OF_MEMORY
from test_keeper import Clients, Ladder, answer, generate

from deployments.engines.fake import FakeEngine, Script
from deployments.engines.protocol import TokenRequest
from deployments.errors import Poison
from deployments.keeper import Keeper
from deployments.oom import Death
from deployments.policy import fixed
from deployments.restarts import RestartLimit
from deployments.supervisor import State, Supervisor

SEGFAULT = replace(KILLED, message="ended by signal 11")
LONG = 600  # tokens: still running when the engine dies


class AllergicEngine(FakeEngine):
    """Dies a few steps after it was given a request whose id begins with `poison`."""

    def __init__(self, death: Death) -> None:
        super().__init__(Script())
        self.death = death
        self.in_company = 0  # deaths with other requests in the batch

    async def generate(self, request: TokenRequest, emitted: Sequence[int]) -> None:
        await super().generate(request, emitted)
        if request.request_id.startswith("poison"):
            asyncio.get_running_loop().call_later(0.005, self._die_of, request.request_id)

    def _die_of(self, request_id: str) -> None:
        if request_id in self._running:
            self.in_company += len(self._running) > 1
            self.die(self.death)


class Kept:
    """A keeper over an allergic engine, and everybody who waits."""

    def __init__(self, ladder: Ladder, death: Death, *, isolation_s: float = 30.0) -> None:
        self.clients = Clients()
        self.engine = AllergicEngine(death)
        self.refused: dict[str, Poison] = {}
        limit = RestartLimit(max_restarts=4, window_s=600.0)
        self.keeper: Keeper[TokenRequest] = Keeper(
            "fake",
            self.engine,
            Supervisor(ladder(0)[0], fixed(ladder), limit),
            on_step=self.clients.on_step,
            on_give_up=self.clients.on_give_up,
            on_refusal=self.refused.__setitem__,
            isolation_s=isolation_s,
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.001)


@pytest.mark.parametrize("death", [OUT_OF_MEMORY, SEGFAULT])
async def test_a_poison_is_refused_and_every_other_client_gets_each_token_once(
    ladder: Ladder, death: Death
) -> None:
    kept = Kept(ladder, death)
    await kept.keeper.start()
    others = ["a", "b", "c"]
    for name in (*others, "poison"):
        await generate(kept.keeper, name, 300)
    await kept.until(lambda: kept.clients.finished == set(others) and bool(kept.refused))
    await kept.until(lambda: kept.keeper.is_serving)
    assert kept.clients.tokens == {**kept.clients.tokens, **{o: answer(o, 300) for o in others}}
    assert list(kept.refused) == ["poison"]
    assert kept.refused["poison"].deaths == 4
    assert len(kept.keeper.journal) == 0
    await kept.keeper.stop()


async def test_the_settings_from_before_the_suspicion_come_back_with_the_conviction(
    ladder: Ladder,
) -> None:
    kept = Kept(ladder, OUT_OF_MEMORY, isolation_s=0.01)
    await kept.keeper.start()
    await generate(kept.keeper, "a", LONG)
    await generate(kept.keeper, "poison")
    await kept.until(lambda: bool(kept.refused) and kept.keeper.is_serving)
    rungs = [attempt.rung for attempt in kept.keeper.supervisor.attempts]
    assert rungs == ["user", "half", "quarter", "quarter", "user"]
    assert kept.keeper.state is State.READY
    # The steps that it took were not for nothing: the next death of memory has them all again.
    kept.engine.die(OUT_OF_MEMORY)
    await kept.until(lambda: kept.keeper.is_serving)
    assert kept.keeper.supervisor.rung.name == "half"
    await kept.keeper.stop()


async def test_who_survives_its_trial_is_served_to_the_end(ladder: Ladder) -> None:
    kept = Kept(ladder, OUT_OF_MEMORY)
    await kept.keeper.start()
    names = ["a", "b", "c"]
    for name in names:
        await generate(kept.keeper, name, 60)
    for _ in range(2):
        await kept.until(lambda: kept.keeper.is_serving)
        kept.engine.die(OUT_OF_MEMORY)
    await kept.until(lambda: kept.clients.finished == set(names))
    assert kept.clients.tokens == {name: answer(name, 60) for name in names}
    assert kept.refused == {}
    await kept.keeper.stop()


async def test_any_number_of_kills_from_outside_refuses_nobody(ladder: Ladder) -> None:
    kept = Kept(ladder, KILLED)
    await kept.keeper.start()
    await generate(kept.keeper, "a", LONG)
    for _ in range(4):
        await kept.until(lambda: kept.keeper.is_serving)
        kept.engine.die(KILLED)
    await kept.until(lambda: kept.clients.finished == {"a"})
    assert kept.clients.tokens["a"] == answer("a", LONG)
    assert kept.refused == {}
    await kept.keeper.stop()


async def test_who_comes_during_a_trial_is_served_after_it(ladder: Ladder) -> None:
    kept = Kept(ladder, SEGFAULT)
    await kept.keeper.start()
    await generate(kept.keeper, "poison")
    lives = kept.engine.lives
    await kept.until(lambda: len(lives) == 3)
    await generate(kept.keeper, "late")
    await kept.until(lambda: kept.clients.finished == {"late"} and bool(kept.refused))
    assert kept.clients.tokens["late"] == answer("late")
    assert kept.engine.in_company == 0
    await kept.keeper.stop()


async def test_a_trial_does_not_wait_for_ever_for_the_innocent(ladder: Ladder) -> None:
    kept = Kept(ladder, SEGFAULT, isolation_s=0.01)
    await kept.keeper.start()
    await generate(kept.keeper, "poison")
    await kept.until(lambda: len(kept.engine.lives) == 3)
    await generate(kept.keeper, "long", 10**6)
    await kept.until(lambda: bool(kept.refused) and kept.keeper.is_serving)
    assert "long" in kept.keeper.journal
    await kept.keeper.stop()


async def test_a_suspect_whose_client_leaves_holds_nobody_up(ladder: Ladder) -> None:
    kept = Kept(ladder, OUT_OF_MEMORY)
    kept.engine.script = Script(step_s=0.02)
    await kept.keeper.start()
    for name in ("a", "b"):
        await generate(kept.keeper, name, LONG)
    for _ in range(2):
        await kept.until(lambda: kept.keeper.is_serving)
        kept.engine.die(OUT_OF_MEMORY)
    await kept.until(lambda: kept.engine.num_running == 1)
    await kept.keeper.abort(["a", "b"])
    await kept.until(lambda: kept.keeper.is_serving)
    assert kept.engine.num_running == 0
    await kept.keeper.stop()
