import asyncio
from collections.abc import Callable, Sequence

import pytest
from samples import KILLED, OUT_OF_MEMORY

from deployments.engines.fake import FakeEngine, Script, next_token
from deployments.engines.protocol import Sampling, Step, TokenRequest
from deployments.errors import BallastError, Busy, Invalid, LadderExhausted
from deployments.faults import Fault, Phase
from deployments.keeper import Keeper
from deployments.oom import Cause
from deployments.policy import fixed
from deployments.restarts import RestartLimit
from deployments.supervisor import State, Supervisor
from deployments.turns import Turns
from vram.ladder import Rung

Ladder = Callable[[int], tuple[Rung, ...]]


class Clients:
    """Everybody who waits for tokens: what each one has got so far."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.error: LadderExhausted | None = None

    def on_step(self, step: Step) -> None:
        for delta in step.outputs:
            self.tokens.setdefault(delta.request_id, []).extend(delta.new_token_ids)
            if delta.finished:
                self.finished.add(delta.request_id)

    def on_give_up(self, error: LadderExhausted) -> None:
        self.error = error

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.001)


@pytest.fixture
def clients() -> Clients:
    return Clients()


def make_keeper(ladder: Ladder, clients: Clients, script: Script) -> Keeper[TokenRequest]:
    supervisor = Supervisor(
        ladder(0)[0], fixed(ladder), RestartLimit(max_restarts=2, window_s=600.0)
    )
    return Keeper(
        "fake",
        FakeEngine(script),
        supervisor,
        on_step=clients.on_step,
        on_give_up=clients.on_give_up,
    )


def request(name: str, max_tokens: int = 20) -> TokenRequest:
    return TokenRequest(
        request_id=name,
        prompt_token_ids=tuple(name.encode()),
        sampling=Sampling(max_tokens=max_tokens),
    )


def answer(name: str, max_tokens: int = 20) -> list[int]:
    """What an undisturbed engine says."""
    tokens = list(name.encode())
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(name) :]


async def generate(keeper: Keeper[TokenRequest], name: str, max_tokens: int = 20) -> None:
    total = len(name) + max_tokens
    await keeper.generate(name, request(name, max_tokens), total_tokens=total)


@pytest.mark.parametrize("cause", [Cause.DEVICE_MEMORY, Cause.HOST_MEMORY, Cause.KILLED])
async def test_each_client_gets_every_token_once_when_the_engine_dies(
    ladder: Ladder, clients: Clients, cause: Cause
) -> None:
    fault = Fault(life=1, cause=cause, after_tokens=30)
    keeper = make_keeper(ladder, clients, Script(faults=(fault,)))
    await keeper.start()
    names = [f"request-{number}" for number in range(5)]
    for name in names:
        await generate(keeper, name)
    await clients.until(lambda: clients.finished == set(names))
    assert clients.tokens == {name: answer(name) for name in names}
    assert keeper.num_replayed == 5
    assert len(keeper.journal) == 0
    await keeper.stop()


async def test_deaths_in_a_row_also_while_replaying_lose_nothing(
    ladder: Ladder, clients: Clients
) -> None:
    faults = (
        Fault(life=1, after_tokens=7),
        Fault(life=2, cause=Cause.KILLED, after_tokens=0),
        Fault(life=3, phase="load_model"),
    )
    keeper = make_keeper(ladder, clients, Script(faults=faults))
    await keeper.start()
    await generate(keeper, "a")
    await generate(keeper, "b")
    await clients.until(lambda: clients.finished == {"a", "b"})
    assert clients.tokens == {"a": answer("a"), "b": answer("b")}
    assert [attempt.rung for attempt in keeper.supervisor.attempts] == [
        "user", "half", "half", "quarter",
    ]  # fmt: skip
    await keeper.stop()


async def test_the_first_load_goes_down_the_ladder_until_it_fits(
    ladder: Ladder, clients: Clients
) -> None:
    faults = tuple(Fault(life=life, phase="load_model") for life in (1, 2))
    keeper = make_keeper(ladder, clients, Script(faults=faults))
    await keeper.start()
    engine = keeper.engine
    assert isinstance(engine, FakeEngine)
    assert [life.max_model_len for life in engine.lives] == [2048, 1024, 512]
    await keeper.stop()


async def test_a_ladder_without_a_rung_that_fits_tells_the_whole_history(
    ladder: Ladder, clients: Clients
) -> None:
    faults = tuple(Fault(life=life, phase="load_model") for life in (1, 2, 3))
    keeper = make_keeper(ladder, clients, Script(faults=faults))
    with pytest.raises(LadderExhausted) as caught:
        await keeper.start()
    assert len(caught.value.attempts) == 3
    assert keeper.state is State.FAILED


async def test_giving_up_tells_the_clients_in_flight(ladder: Ladder, clients: Clients) -> None:
    faults = (
        Fault(life=1, after_tokens=2),
        Fault(life=2, phase=Phase.LOAD_MODEL),
        Fault(life=3, phase=Phase.LOAD_MODEL),
    )
    keeper = make_keeper(ladder, clients, Script(faults=faults))
    await keeper.start()
    await generate(keeper, "a")
    await clients.until(lambda: clients.error is not None)
    assert keeper.state is State.FAILED
    with pytest.raises(Busy):
        await keeper.admission(wait_s=1.0, max_waiting=1)


async def test_a_request_made_during_the_recovery_is_served_by_the_new_engine(
    ladder: Ladder, clients: Clients
) -> None:
    keeper = make_keeper(ladder, clients, Script(load_s=0.02))
    await keeper.start()
    engine = keeper.engine
    assert isinstance(engine, FakeEngine)
    engine.die(KILLED)
    assert not keeper.is_serving
    await generate(keeper, "late")
    await clients.until(lambda: "late" in clients.finished)
    assert clients.tokens["late"] == answer("late")
    assert keeper.num_replayed == 0
    await keeper.stop()


async def test_new_requests_wait_for_the_engine_and_then_are_let_in(
    ladder: Ladder, clients: Clients
) -> None:
    keeper = make_keeper(ladder, clients, Script(load_s=0.02))
    await keeper.start()
    keeper.engine.die(OUT_OF_MEMORY)  # type: ignore[attr-defined]
    await keeper.admission(wait_s=5.0, max_waiting=1)
    assert keeper.state is State.READY
    await keeper.stop()


async def test_more_than_may_wait_are_sent_away_with_a_time(
    ladder: Ladder, clients: Clients
) -> None:
    keeper = make_keeper(ladder, clients, Script(load_s=0.05))
    await keeper.start()
    keeper.engine.die(OUT_OF_MEMORY)  # type: ignore[attr-defined]
    waiting = asyncio.create_task(keeper.admission(wait_s=5.0, max_waiting=1))
    await asyncio.sleep(0)
    with pytest.raises(Busy, match="max_waiting") as caught:
        await keeper.admission(wait_s=5.0, max_waiting=1)
    assert caught.value.retry_after_s == 5
    await waiting
    keeper.engine.die(OUT_OF_MEMORY)  # type: ignore[attr-defined]
    with pytest.raises(Busy, match="wait_s"):
        await keeper.admission(wait_s=0.001, max_waiting=1)
    await keeper.stop()


async def test_a_client_that_left_is_not_replayed(ladder: Ladder, clients: Clients) -> None:
    keeper = make_keeper(ladder, clients, Script(load_s=0.01))
    await keeper.start()
    await generate(keeper, "stays")
    await generate(keeper, "leaves", max_tokens=1000)
    keeper.engine.die(KILLED)  # type: ignore[attr-defined]
    await keeper.abort(["leaves"])
    await clients.until(lambda: "stays" in clients.finished)
    assert keeper.num_replayed == 1
    assert keeper.engine.num_running == 0  # type: ignore[attr-defined]
    await keeper.stop()


async def test_tokens_of_a_life_that_is_over_reach_nobody(ladder: Ladder, clients: Clients) -> None:
    keeper = make_keeper(ladder, clients, Script())
    await keeper.start()
    keeper.heard_step(0, type("Late", (), {"outputs": ()})())
    assert clients.tokens == {}
    await keeper.stop()


async def test_a_bug_in_the_recovery_is_told_instead_of_hanging(
    ladder: Ladder, clients: Clients
) -> None:
    keeper = make_keeper(ladder, clients, Script())

    async def broken() -> None:
        raise RuntimeError("a bug")

    await keeper.start()
    keeper.engine.stop, stop = broken, keeper.engine.stop  # type: ignore[method-assign]
    keeper.engine.die(KILLED)  # type: ignore[attr-defined]
    await clients.until(lambda: clients.error is not None)
    assert "a bug" in str(clients.error)
    keeper.engine.stop = stop  # type: ignore[method-assign]


async def test_a_request_that_the_engine_refuses_when_replayed_ends_alone(
    ladder: Ladder, clients: Clients
) -> None:
    class Strict(FakeEngine):
        async def generate(self, request: TokenRequest, emitted: Sequence[int]) -> None:
            if request.request_id == "bad":
                raise Invalid("the prompt has token 999", "prompt")
            await super().generate(request, emitted)

    refused: list[tuple[str, BallastError]] = []
    fault = Fault(life=1, cause=Cause.KILLED, after_tokens=3)
    keeper = make_keeper(ladder, clients, Script())
    keeper.engine = keeper._handover._engine = Strict(Script(faults=(fault,), load_s=0.05))
    keeper._on_refusal = lambda request_id, error: refused.append((request_id, error))
    await keeper.start()
    await generate(keeper, "good")
    await clients.until(lambda: keeper.state is State.RECOVERING)
    await generate(keeper, "bad")  # nobody looks at it before the engine is back
    await generate(keeper, "late")
    await clients.until(lambda: clients.finished == {"good", "late"})
    assert clients.tokens["good"] == answer("good")
    assert [(name, type(error)) for name, error in refused] == [("bad", Invalid)]
    assert keeper.state is State.READY
    assert len(keeper.journal) == 0
    await keeper.stop()


async def test_a_client_that_leaves_while_its_request_is_handed_over_frees_it(
    ladder: Ladder, clients: Clients
) -> None:
    class Slow(FakeEngine):
        async def generate(self, request: TokenRequest, emitted: Sequence[int]) -> None:
            await super().generate(request, emitted)
            await asyncio.sleep(5)  # it has it, and its confirmation is on its way

    keeper = make_keeper(ladder, clients, Script())
    keeper.engine = keeper._handover._engine = engine = Slow()
    await keeper.start()
    client = asyncio.create_task(generate(keeper, "a", max_tokens=10_000))
    await clients.until(lambda: engine.num_running == 1)
    client.cancel()
    await asyncio.gather(client, return_exceptions=True)
    assert engine.num_running == 0
    assert len(keeper.journal) == 0
    await keeper.stop()


@pytest.mark.parametrize("is_up", [True, False], ids=["up", "recovering"])
async def test_a_request_that_is_taken_on_lets_the_next_pass(
    ladder: Ladder, clients: Clients, is_up: bool
) -> None:
    """Long before its answer ends, and also while there is no engine that could give one."""
    keeper = make_keeper(ladder, clients, Script())
    if is_up:
        await keeper.start()
    line = Turns(limit_s=60.0)
    async with asyncio.timeout(5):
        await line.take()
        await generate(keeper, "a")
        await line.take()
    await keeper.stop()
