"""A replica that stepped down, the next one, and the way back: a keeper with the fake engine."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from samples import OUT_OF_MEMORY, remembered
from test_keeper import Clients, Ladder, answer, generate

from deployments.engines.fake import FakeEngine, Script
from deployments.engines.protocol import Measurement, TokenRequest
from deployments.errors import Busy
from deployments.faults import Fault
from deployments.healer import Healer
from deployments.healing import SETTLE_S, Room
from deployments.keeper import Keeper
from deployments.oom import Cause
from deployments.policy import fixed
from deployments.restarts import RestartLimit
from deployments.settings_store import SettingsStore
from deployments.supervisor import State, Supervisor
from vram.settings import EngineSettings

QUIET_S = 1000.0
OF = {"model": "fake", "version": "1"}


class Replica:
    """A keeper, its healer and their clock."""

    def __init__(
        self,
        ladder: Ladder,
        store: SettingsStore,
        *,
        faults: tuple[Fault, ...] = (),
        rooms: dict[int, Room] | None = None,
        cut_to: int | None = None,
    ) -> None:
        self.now_s = 10_000.0
        self.clients = Clients()
        self.rooms = rooms or {}
        self.cut_to = cut_to
        asked = ladder(0)[0]
        remembered = store.read()
        self.keeper: Keeper[TokenRequest] = Keeper(
            "fake",
            FakeEngine(Script(faults=faults)),
            Supervisor(
                asked,
                fixed(ladder),
                RestartLimit(max_restarts=2, window_s=600.0),
                remembered=remembered and remembered.course(asked, lambda _: True),
                heal_after_s=QUIET_S,
            ),
            on_step=self.clients.on_step,
            on_give_up=self.clients.on_give_up,
            before_load=self.check,
            clock=lambda: self.now_s,
        )
        self.healer = Healer(
            self.keeper,
            store,
            heal_after_s=QUIET_S,
            lease_s=2 * QUIET_S,
            room=self.room,
            clock=lambda: self.now_s,
        )

    async def check(self, settings: EngineSettings) -> EngineSettings:
        tokens = min(settings.max_model_len, self.cut_to or settings.max_model_len)
        return replace(settings, max_model_len=tokens)

    async def room(
        self, larger: EngineSettings, now: EngineSettings, held: Measurement
    ) -> Room | None:
        return self.rooms.get(larger.max_model_len)

    @property
    def engine(self) -> FakeEngine:
        assert isinstance(self.keeper.engine, FakeEngine)
        return self.keeper.engine

    @property
    def lives(self) -> list[int]:
        return [life.max_model_len for life in self.engine.lives]

    async def serves(self, life: int) -> None:
        await self.clients.until(lambda: self.keeper.is_serving and len(self.lives) == life)
        await self.clients.until(lambda: self.keeper._is_calm)

    async def dies(self) -> None:
        life = len(self.lives)
        self.engine.die(OUT_OF_MEMORY)
        await self.serves(life + 1)

    async def answers(self, name: str) -> None:
        await generate(self.keeper, name)
        await self.clients.until(lambda: name in self.clients.finished)

    async def waits(self, seconds: float, *, looks: int = 1) -> None:
        for _ in range(looks):
            self.now_s += seconds / looks
            await self.healer.look()
        await self.clients.until(
            lambda: self.keeper.state is not State.RECOVERING and self.keeper._is_calm
        )
        await self.healer.look()


@pytest.fixture
def store(tmp_path: Path) -> SettingsStore:
    return SettingsStore(tmp_path, OF)


Make = Callable[..., Replica]


@pytest.fixture
def make(ladder: Ladder, tmp_path: Path) -> Make:
    def made(**given: object) -> Replica:
        return Replica(ladder, SettingsStore(tmp_path, OF), **given)  # type: ignore[arg-type]

    return made


async def test_a_new_replica_starts_where_the_last_one_worked_and_climbs_to_what_was_asked(
    make: Make, store: SettingsStore
) -> None:
    first = make()
    await first.keeper.start()
    await first.dies()
    await first.healer.look()
    assert store.read() is None  # it has not shown yet that it works
    await first.answers("a")
    await first.healer.look()
    assert store.read() is not None
    await first.keeper.stop()

    second = make()
    await second.keeper.start()
    assert second.lives == [1024]
    assert str(second.keeper.supervisor.attempts[0]).startswith("half, remembered")
    await second.waits(QUIET_S - 1)
    assert second.lives == [1024]
    await second.waits(1)
    assert second.lives == [1024, 2048]
    assert store.read() is not None  # a climb has to last before it counts
    await second.waits(QUIET_S)
    assert store.read() is None
    assert second.lives == [1024, 2048]
    assert store.lease_holder(second.now_s) is None
    await second.keeper.stop()

    third = make()
    await third.keeper.start()
    assert third.lives == [2048]
    await third.keeper.stop()


async def test_two_steps_down_are_two_steps_back(make: Make) -> None:
    replica = make()
    await replica.keeper.start()
    await replica.dies()
    await replica.dies()
    await replica.waits(QUIET_S)
    assert replica.lives == [2048, 1024, 512, 1024]
    await replica.waits(QUIET_S)
    assert replica.lives == [2048, 1024, 512, 1024, 2048]
    await replica.waits(QUIET_S)
    await replica.dies()  # what was short before has been over for long: the first step again
    assert replica.lives[-1] == 1024
    await replica.keeper.stop()


async def test_new_requests_wait_for_a_climb_as_for_a_restart(make: Make) -> None:
    replica = make()
    await replica.keeper.start()
    await replica.dies()
    assert replica.keeper.climb("it has been quiet")
    with pytest.raises(Busy):
        await replica.keeper.admission(wait_s=1.0, max_waiting=0)
    assert not replica.keeper.climb("it is climbing already")
    await replica.keeper.admission(wait_s=5.0, max_waiting=1)
    await replica.keeper.stop()


async def test_streams_in_flight_survive_a_climb(make: Make) -> None:
    replica = make()
    await replica.keeper.start()
    await replica.dies()
    await generate(replica.keeper, "long", 400)
    await replica.waits(QUIET_S)
    assert replica.lives == [2048, 1024]  # it waits for an idle moment
    assert "long" not in replica.clients.finished
    await replica.waits(QUIET_S)
    assert replica.lives == [2048, 1024, 2048]
    await replica.clients.until(lambda: "long" in replica.clients.finished)
    assert replica.clients.tokens["long"] == answer("long", 400)
    await replica.keeper.stop()


@pytest.mark.parametrize("phase", ["load_model", "execute_model"])
async def test_a_climb_that_dies_comes_back_without_a_failed_request_and_waits_twice_as_long(
    make: Make, store: SettingsStore, phase: str
) -> None:
    replica = make(faults=(Fault(life=3, phase=phase),))
    await replica.keeper.start()
    await replica.dies()
    await replica.answers("a")
    await replica.waits(QUIET_S)
    await replica.answers("b")
    await replica.serves(4)
    assert replica.lives == [2048, 1024, 2048, 1024]
    assert replica.clients.tokens["b"] == answer("b")
    assert replica.clients.error is None
    await replica.healer.look()
    found = store.read()
    assert found is not None
    assert (found.rung.name, found.failed_climbs) == ("half", 1)
    assert store.lease_holder(replica.now_s) is None
    await replica.waits(2 * QUIET_S - 1)
    assert len(replica.lives) == 4
    await replica.waits(1)
    assert replica.lives[-1] == 2048
    await replica.keeper.stop()


async def test_a_death_after_a_climb_that_lasted_is_a_step_down_like_the_first(make: Make) -> None:
    replica = make()
    await replica.keeper.start()
    await replica.dies()
    await replica.waits(QUIET_S)
    await replica.waits(QUIET_S)
    await replica.dies()
    assert replica.lives == [2048, 1024, 2048, 1024]
    assert replica.keeper.supervisor.failed_climbs == 0
    await replica.keeper.stop()


async def test_one_replica_climbs_at_a_time(make: Make) -> None:
    one, other = make(), make()
    for replica in (one, other):
        await replica.keeper.start()
        await replica.dies()
    await one.waits(QUIET_S)
    await other.waits(QUIET_S)
    assert one.lives == [2048, 1024, 2048]
    assert other.lives == [2048, 1024]
    await one.waits(QUIET_S)  # it has shown that it lasts
    await other.waits(QUIET_S)
    assert other.lives == [2048, 1024, 2048]
    for replica in (one, other):
        await replica.keeper.stop()


async def test_the_failed_climb_of_one_replica_holds_the_others_back(make: Make) -> None:
    one, other = make(faults=(Fault(life=3, phase="load_model"),)), make()
    for replica in (one, other):
        await replica.keeper.start()
        await replica.dies()
        await replica.answers("a")
        await replica.healer.look()
    await one.waits(QUIET_S)
    assert one.lives == [2048, 1024, 2048, 1024]
    await other.waits(2 * QUIET_S)
    assert other.lives == [2048, 1024]
    await other.waits(QUIET_S)
    assert other.lives == [2048, 1024, 2048]
    for replica in (one, other):
        await replica.keeper.stop()


async def test_when_a_co_tenant_has_gone_it_climbs_at_once_also_to_what_never_served(
    make: Make,
) -> None:
    replica = make(faults=(Fault(life=1, phase="load_model"),))
    await replica.keeper.start()
    assert replica.lives == [2048, 1024]
    await replica.waits(10 * QUIET_S, looks=20)
    assert replica.lives == [2048, 1024]
    replica.rooms[2048] = Room(needed_bytes=50, then_bytes=40, now_bytes=60)
    await replica.waits(31)
    await replica.waits(SETTLE_S - 1)
    assert replica.lives == [2048, 1024]
    await replica.waits(1)
    assert replica.lives == [2048, 1024, 2048]
    await replica.keeper.stop()


async def test_what_the_check_before_the_load_took_is_taken_back_when_there_is_room(
    make: Make,
) -> None:
    replica = make(cut_to=700)
    await replica.keeper.start()
    await replica.waits(10 * QUIET_S)
    assert replica.lives == [700]
    replica.cut_to = None
    replica.rooms[2048] = Room(needed_bytes=50, then_bytes=40, now_bytes=60)
    await replica.waits(31)
    await replica.waits(SETTLE_S)
    assert replica.lives == [700, 2048]
    await replica.waits(10 * QUIET_S, looks=5)
    assert replica.lives == [700, 2048]
    await replica.keeper.stop()


@pytest.mark.parametrize("cause", [Cause.OTHER, Cause.DEVICE_MEMORY])
async def test_what_was_remembered_never_keeps_a_model_from_starting_as_asked(
    make: Make, store: SettingsStore, ladder: Ladder, cause: Cause
) -> None:
    store.write(remembered(ladder(0)[2]))  # the last rung: no smaller is left
    replica = make(faults=(Fault(life=1, phase="load_model", cause=cause),))
    await replica.keeper.start()
    assert replica.lives == [512, 2048]
    await replica.keeper.stop()


async def test_a_climb_for_which_there_was_no_room_after_all_is_not_tried_again_soon(
    make: Make,
) -> None:
    replica = make(cut_to=700)
    await replica.keeper.start()
    replica.rooms[2048] = Room(needed_bytes=50, then_bytes=40, now_bytes=60)
    await replica.waits(31)
    await replica.waits(SETTLE_S)
    assert replica.lives == [700, 700]
    assert replica.keeper.supervisor.failed_climbs == 1
    await replica.waits(2 * QUIET_S - 1, looks=30)
    assert replica.lives == [700, 700]
    await replica.waits(2)
    assert replica.lives == [700, 700, 700]
    assert replica.keeper.supervisor.failed_climbs == 2
    await replica.keeper.stop()


async def test_a_stream_that_needs_the_larger_context_keeps_it_when_the_climb_dies(
    make: Make,
) -> None:
    replica = make()
    await replica.keeper.start()
    await replica.dies()
    await replica.waits(QUIET_S)
    await generate(replica.keeper, "long", 1500)
    await replica.dies()
    assert replica.lives[:3] == [2048, 1024, 2048]
    assert replica.lives[-1] >= 1500
    await replica.clients.until(lambda: "long" in replica.clients.finished)
    assert replica.clients.tokens["long"] == answer("long", 1500)
    await replica.keeper.stop()


async def test_the_healer_looks_by_itself_until_it_is_stopped(
    make: Make, store: SettingsStore
) -> None:
    replica = make()
    replica.healer._ticker._every_s = 0.001
    await replica.keeper.start()
    replica.healer.start()
    await replica.dies()
    await replica.answers("a")
    await replica.clients.until(lambda: store.read() is not None)
    replica.now_s += QUIET_S
    await replica.serves(3)
    assert store.lease_holder(replica.now_s) is not None
    await replica.healer.stop()
    assert store.lease_holder(replica.now_s) is None
    await replica.keeper.stop()
