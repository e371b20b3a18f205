"""Remembers what worked, and climbs back. Looks at the keeper again and again; `healing` decides.

Thin: what it finds out goes into `Facts`, what comes out of them to the keeper and the store.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from deployments.engines.protocol import Measurement
from deployments.errors import EngineDied
from deployments.healing import Facts, Room, due_at_s, may_climb
from deployments.keeper import Keeper
from deployments.remembered import Remembered
from deployments.settings_store import SettingsStore
from deployments.supervisor import State
from deployments.ticker import Ticker
from vram.settings import EngineSettings

TICK_S = 5.0
ROOM_EVERY_S = 30.0  # on a card it costs a task of Ray
PROVEN_S = 30.0  # that a smaller engine serves without having been asked anything

log = structlog.get_logger(__name__)


RoomFor = Callable[[EngineSettings, EngineSettings, Measurement], Awaitable[Room | None]]


async def _unknown(larger: EngineSettings, now: EngineSettings, held: Measurement) -> Room | None:
    return None


class Healer:
    """Of one replica; runs from its first life until `stop`."""

    def __init__(
        self,
        keeper: Keeper[Any],
        store: SettingsStore,
        *,
        heal_after_s: float,
        lease_s: float,
        remember: bool = True,
        room: RoomFor = _unknown,
        tick_s: float = TICK_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.next_climb_at_s: float | None = None  # as far as is known
        self._keeper = keeper
        self._store = store
        self._heal_after_s = heal_after_s
        self._lease_s = lease_s
        self._remember = remember
        self._room_for = room
        self._clock = clock
        self._name = uuid.uuid4().hex
        self._written: Remembered | None = None  # what the store has of this replica's course
        if remember and keeper.supervisor.course.is_degraded:
            self._written = store.read()
        self._room: Room | None = None
        self._room_since_s: float | None = None
        self._room_of: tuple[int, float] = (0, float("-inf"))  # generation, time
        self._holds_lease = False
        self._ticker = Ticker(
            self.look, every_s=tick_s, model=keeper.model, failure="healer_failed"
        )

    def start(self) -> None:
        self._ticker.start()

    async def stop(self) -> None:
        await self._ticker.stop()
        if self._holds_lease:
            self._store.release_lease(self._name)

    async def look(self) -> None:
        """Once."""
        keeper, now_s = self._keeper, self._clock()
        if keeper.state is not State.READY or not keeper.is_serving:
            return
        supervisor = keeper.supervisor
        if supervisor.has_settled(now_s):
            supervisor.settle()
        await self._keep(now_s)
        if self._holds_lease and supervisor.course.back is None:
            await self._release_lease()
        if not supervisor.is_degraded:
            self.next_climb_at_s = None
            return
        facts = await self._facts(now_s)
        self.next_climb_at_s = due_at_s(facts, self._heal_after_s)
        if may_climb(facts, self._heal_after_s, now_s):
            await self._climb(facts, now_s)

    async def _climb(self, facts: Facts, now_s: float) -> None:
        until_s = now_s + self._lease_s
        if not await asyncio.to_thread(
            self._store.take_lease, self._name, now_s=now_s, until_s=until_s
        ):
            return
        self._holds_lease = True
        has_room = facts.room_since_s is not None
        reason = "the card has room again" if has_room else "it has been quiet"
        if not self._keeper.climb(reason):
            await self._release_lease()

    async def _release_lease(self) -> None:
        self._holds_lease = False
        await asyncio.to_thread(self._store.release_lease, self._name)

    async def _keep(self, now_s: float) -> None:
        """Write what works, once it has shown that it does; a climb shows it by a quiet time."""
        supervisor = self._keeper.supervisor
        course, attempt = supervisor.course, supervisor.attempts[-1]
        if not self._remember or course.back is not None or attempt.started_at_s is None:
            return
        if not course.is_degraded:
            if self._written is not None:
                self._written = None
                await asyncio.to_thread(self._store.forget)
            return
        has_served = self._keeper.finished_in == attempt.generation
        is_known = self._written is not None and self._written.rung == course.rung
        if not (has_served or is_known) and now_s - attempt.started_at_s < PROVEN_S:
            return
        found = Remembered.of(
            course,
            at_s=attempt.started_at_s,
            failed_climbs=supervisor.failed_climbs,
            failed_at_s=supervisor.failed_at_s,
        )
        if found != self._written:
            self._written = found
            await asyncio.to_thread(self._store.write, found)
            log.info("settings_remembered", model=self._keeper.model, rung=course.rung.name)

    async def _facts(self, now_s: float) -> Facts:
        supervisor = self._keeper.supervisor
        course, attempt = supervisor.course, supervisor.attempts[-1]
        larger = course.rung if supervisor.is_cut else course.larger
        if larger is not None:
            await self._look_for_room(larger.settings, attempt.generation, now_s)
        others = self._store.read() if self._remember else None
        failed_climbs, failed_at_s = supervisor.failed_climbs, supervisor.failed_at_s
        if others is not None and others.failed_at_s > failed_at_s:
            failed_climbs, failed_at_s = others.failed_climbs, others.failed_at_s
        return Facts(
            has_larger=larger is not None,
            larger_has_served=course.larger_has_served and not supervisor.is_cut,
            quiet_since_s=attempt.started_at_s or now_s,
            failed_climbs=failed_climbs,
            failed_at_s=failed_at_s,
            in_flight=len(self._keeper.journal),
            room=self._room,
            room_since_s=self._room_since_s,
            is_other_climbing=self._store.lease_holder(now_s) not in (None, self._name),
        )

    async def _look_for_room(self, larger: EngineSettings, generation: int, now_s: float) -> None:
        looked_in, looked_at_s = self._room_of
        if generation != looked_in:
            self._room_since_s = None
        elif now_s - looked_at_s < ROOM_EVERY_S:
            return
        self._room_of = generation, now_s
        try:
            held = await self._keeper.engine.measure()
        except EngineDied:
            return
        self._room = await self._room_for(larger, self._keeper.settings or larger, held)
        if self._room is None or not self._room.has_come:
            self._room_since_s = None
        elif self._room_since_s is None:
            self._room_since_s = now_s
