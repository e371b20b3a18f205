"""Looks after the engine once a second, and gives a stopped or silent one its death. Thin."""

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import structlog

from deployments import processes
from deployments.engines.protocol import Engine
from deployments.errors import EngineDied
from deployments.keeper import Keeper
from deployments.ticker import Ticker
from deployments.watchdog import Facts, Patience, Watchdog

TICK_S = 1.0
_FIND_AGAIN_S = 5.0  # a look through all of /proc: 10 ms of a core for 500 processes
_ANSWER_S = 1.0  # a stopped engine answers nothing, and is what is looked for

log = structlog.get_logger(__name__)


class Watcher:
    """Runs from before the first load until `stop`."""

    def __init__(
        self,
        keeper: Keeper[Any],
        patience: Patience,
        *,
        tick_s: float = TICK_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keeper = keeper
        self._watchdog = Watchdog(patience, tick_s=tick_s)
        self._processes = EngineProcesses(keeper.engine, clock, answer_s=min(_ANSWER_S, tick_s))
        self._clock = clock
        self._ticker = Ticker(
            self._look, every_s=tick_s, model=keeper.model, failure="watcher_failed"
        )

    def start(self) -> None:
        self._ticker.start()

    async def stop(self) -> None:
        await self._ticker.stop()

    async def _look(self) -> None:
        watched = self._keeper.watched()
        if watched is None:  # nothing lives, or its end is known
            return
        stopped = await self._processes.stopped(watched.generation, is_loading=watched.is_loading)
        death = self._watchdog.look(Facts(at_s=self._clock(), life=watched, stopped=stopped))
        if death is not None:
            self._keeper.end_life(watched.generation, death)


class EngineProcesses:
    """The processes of the life that now runs, as far as they are on this node."""

    def __init__(
        self, engine: Engine[Any], clock: Callable[[], float], *, answer_s: float = _ANSWER_S
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._answer_s = answer_s
        self._ids: tuple[int, ...] = ()
        self._found_at_s = float("-inf")
        self._generation = 0
        self._was_asked = False

    async def stopped(self, generation: int, *, is_loading: bool) -> frozenset[tuple[int, str]]:
        """Those that a signal has stopped."""
        if generation != self._generation:
            self._generation, self._found_at_s, self._was_asked = generation, float("-inf"), False
        if self._clock() - self._found_at_s > _FIND_AGAIN_S:
            self._found_at_s = self._clock()
            await self._find(is_loading)
        return frozenset(
            (process_id, name)
            for process_id in self._ids
            for state, name in [processes.state_of(process_id)]
            if state == "T"
        )

    async def _find(self, is_loading: bool) -> None:
        owned = await asyncio.to_thread(processes.find_owned, processes.identity(os.getpid()))
        if owned:
            self._ids = owned
        elif not is_loading and not self._was_asked:  # Ray's actors carry no mark of ours
            self._was_asked, self._ids = True, ()
            try:
                async with asyncio.timeout(self._answer_s):
                    self._ids = (await self._engine.measure()).process_ids
            except TimeoutError:
                self._was_asked = False
            except EngineDied:
                return  # its keeper hears of it by itself
