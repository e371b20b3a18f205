"""The fake engine dies in every phase and in every way, and its clients get their answers."""

import asyncio

import pytest
from samples import SETTINGS
from test_keeper import Clients, Ladder, answer, generate, make_keeper, request

from deployments.engines.fake import FakeEngine, Script
from deployments.engines.protocol import Step
from deployments.faults import Fault, Way
from deployments.keeper import Keeper
from deployments.oom import Cause, Death
from deployments.phases import LOADING, Phase

NAMES = [f"request-{number}" for number in range(4)]
ENDS: list[tuple[Way, Cause]] = [
    ("exception", Cause.DEVICE_MEMORY),
    ("sigkill", Cause.KILLED),
    ("exit", Cause.OTHER),
]


class Silence:
    """A listener that has to hear nothing."""

    def stepped(self, step: Step) -> None:
        raise AssertionError(step)

    def died(self, death: Death) -> None:
        raise AssertionError(death)


@pytest.fixture
def clients() -> Clients:
    return Clients()


async def serve_all(keeper: Keeper[object], clients: Clients) -> None:
    await keeper.start()
    for name in NAMES:
        await generate(keeper, name)
    await clients.until(lambda: clients.finished == set(NAMES))
    assert clients.tokens == {name: answer(name) for name in NAMES}
    await keeper.stop()


@pytest.mark.parametrize(("way", "cause"), ENDS)
@pytest.mark.parametrize("phase", Phase)
async def test_a_death_after_a_first_one_costs_no_token(
    ladder: Ladder, clients: Clients, phase: Phase, way: Way, cause: Cause
) -> None:
    faults = (Fault(life=1, after_tokens=9, by="sigkill"), Fault(life=2, phase=phase, by=way))
    keeper = make_keeper(ladder, clients, Script(faults=faults))
    await serve_all(keeper, clients)
    death = keeper.supervisor.attempts[1].death
    assert death is not None
    assert death.cause is cause
    assert death.phase == ("running" if phase is Phase.EXECUTE_MODEL else "loading")
    assert len(keeper.supervisor.attempts) == 3


@pytest.mark.parametrize("phase", LOADING)
async def test_memory_that_runs_out_in_the_first_load_costs_a_rung(
    ladder: Ladder, clients: Clients, phase: Phase
) -> None:
    keeper = make_keeper(ladder, clients, Script(faults=(Fault(life=1, phase=phase),)))
    await serve_all(keeper, clients)
    assert len(keeper.supervisor.attempts) == 2


async def test_a_death_in_the_first_step_of_a_replay(ladder: Ladder, clients: Clients) -> None:
    faults = (Fault(life=1, after_tokens=9), Fault(life=2, at_replay=True, by="sigkill"))
    keeper = make_keeper(ladder, clients, Script(faults=faults))
    await serve_all(keeper, clients)
    assert len(keeper.supervisor.attempts) == 3


async def test_poison_kills_each_life_that_has_it(ladder: Ladder, clients: Clients) -> None:
    fault = Fault(prompt_contains="pois")
    keeper = make_keeper(ladder, clients, Script(faults=(fault,)))
    await keeper.start()
    await generate(keeper, "poison")
    await clients.until(lambda: clients.error is not None or len(keeper.journal) == 0)
    deaths = [a.death for a in keeper.supervisor.attempts if a.death is not None]
    assert len(deaths) >= 2
    assert all(death.requests == ("poison",) for death in deaths)


@pytest.mark.parametrize("phase", LOADING)
async def test_a_load_that_was_stopped_neither_ends_nor_fails(phase: Phase) -> None:
    engine = FakeEngine(Script(faults=(Fault(life=1, phase=phase, by="sigstop"),)))
    start = asyncio.create_task(engine.start(SETTINGS, Silence()))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not start.done()
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    await engine.stop()
    await engine.start(SETTINGS, Silence())
    await engine.stop()


async def test_a_stopped_engine_says_nothing_and_ends_when_it_is_told_to() -> None:
    engine = FakeEngine(Script(step_s=0, faults=(Fault(life=1, by="sigstop"),)))
    await engine.start(SETTINGS, Silence())
    await engine.generate(request("a"), ())
    for _ in range(20):
        await asyncio.sleep(0)
    assert engine.num_running == 1
    await engine.stop()
    assert engine.num_running == 0
