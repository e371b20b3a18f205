"""A model that is served with memory: from the config to the first settings of the next replica."""

from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError
from samples import OUT_OF_MEMORY
from test_openai_harness import until

from deployments import cards
from deployments.cards import Available, Card
from deployments.config import DeviceConfig, ModelConfig, RecoveryConfig
from deployments.engines.fake import FakeEngine
from deployments.engines.protocol import Measurement
from deployments.load_check import LoadCheck
from deployments.planning import make_plan
from deployments.serving import Serving, start_serving
from vram.units import GIB

CONFIG = ModelConfig(
    name="demo", model="-", engine="fake", device=DeviceConfig(kind="cpu", memory_gib=1)
)


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BALLAST_STATE", str(tmp_path))


async def start(config: ModelConfig) -> Serving:
    return await start_serving(config, make_plan(config)[0], placement_group=None)


async def step_down(serving: Serving) -> None:
    """And have it remembered, as after some time of service."""
    keeper = serving.keeper
    assert isinstance(keeper.engine, FakeEngine)
    keeper.engine.die(OUT_OF_MEMORY)
    await until(lambda: keeper.is_serving and keeper.supervisor.generation == 2)
    keeper.finished_in = 2
    await serving.healer.look()


def with_recovery(**given: Any) -> ModelConfig:
    return CONFIG.model_copy(update={"recovery": RecoveryConfig(**given)})


async def test_the_next_replica_starts_with_what_worked_unless_the_config_has_changed() -> None:
    serving = await start(CONFIG)
    await step_down(serving)
    worked = serving.keeper.settings
    await serving.stop()

    again = await start(CONFIG)
    assert again.keeper.settings == worked
    assert again.keeper.supervisor.is_degraded
    await again.stop()

    other_config = CONFIG.model_copy(update={"max_num_seqs": 3})
    for config in (other_config, with_recovery(remember=False), with_recovery(policy="fixed")):
        anew = await start(config)
        assert not anew.keeper.supervisor.is_degraded
        await anew.stop()


async def test_without_remember_nothing_is_written(tmp_path: Path) -> None:
    serving = await start(with_recovery(remember=False))
    await step_down(serving)
    await serving.stop()
    assert list(tmp_path.rglob("*.json")) == []


HELD = Measurement(resident_bytes=GIB // 2, device_bytes=0, process_ids=())


async def test_room_is_what_is_free_and_what_the_engine_would_give_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = [GIB // 4, GIB // 8, GIB]

    async def available(*_: Any, **__: Any) -> Available:
        return Available(free_bytes=free.pop(0))

    monkeypatch.setattr("deployments.load_check.available", available)
    plan = make_plan(CONFIG)[0]
    check = LoadCheck(CONFIG, plan, None)
    assert await check.room(plan.settings, plan.settings, HELD) is None  # nothing was loaded yet
    now = await check(plan.settings)
    room = await check.room(plan.settings, now, HELD)
    assert room is not None
    assert room.needed_bytes == plan.estimate.device_use_under_load_bytes
    assert (room.then_bytes, room.now_bytes) == (GIB // 4, GIB // 8 + GIB // 2)
    room = await check.room(plan.settings, now, HELD)
    assert room is not None
    assert room.now_bytes == GIB  # never more than the model's share


def test_cards_of_another_node_are_not_looked_at() -> None:
    card = Card(node_id="there", index=0, free_bytes=1)
    assert cards.free_here((card,), "here") is None
    assert cards.free_here((), "here") is None


async def test_a_check_that_cannot_see_the_cards_lets_the_load_decide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a recovery, it would end every stream."""
    device = DeviceConfig(kind="cuda", name="H200", gpu_fraction=0.4)
    config = CONFIG.model_copy(update={"device": device})
    plan = make_plan(config)[0]

    async def cards_of(_: Any) -> tuple[Card, ...]:
        raise GetTimeoutError("nothing was heard of the tasks in 60 s")

    monkeypatch.setattr(cards, "cards_of", cards_of)
    assert await LoadCheck(config, plan, None)(plan.settings) == plan.settings


async def test_an_engine_is_ended_when_what_comes_after_its_load_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engines: list[FakeEngine] = []

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the front cannot be made")

    start_engine = FakeEngine.start

    async def noted(self: FakeEngine, *args: Any) -> None:
        engines.append(self)
        await start_engine(self, *args)

    monkeypatch.setattr(FakeEngine, "start", noted)
    monkeypatch.setattr("deployments.openai.app.build_openai_app", fail)
    with pytest.raises(RuntimeError, match="the front"):
        await start(CONFIG)
    assert [engine._loop_task for engine in engines] == [None]
