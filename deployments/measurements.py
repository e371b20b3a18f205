"""The newest measurement of an engine, kept fresh while nobody waits for it. Knows no HTTP."""

import asyncio
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from deployments.engines.protocol import Measurement
from deployments.errors import EngineDied
from deployments.keeper import Keeper
from vram.settings import EngineSettings

MEASURE_EVERY_S = 10.0  # it reads every process of the machine
WATCH_EVERY_S = 60.0  # without anybody who asks

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What life `generation` of the engine held at a time."""

    measurement: Measurement
    generation: int
    at_s: float


class Measurements:
    """Measures when somebody asks and the newest one is old, or is of another life."""

    def __init__(
        self,
        keeper: Keeper[Any],
        *,
        every_s: float = MEASURE_EVERY_S,
        clock: Callable[[], float] = time.time,
        on_measured: Callable[[Measured, EngineSettings], None] | None = None,
    ) -> None:
        self.newest: Measured | None = None
        self._keeper = keeper
        self._every_s = every_s
        self._clock = clock
        self._on_measured = on_measured  # called in a thread: it may write a file
        self._task: asyncio.Task[None] | None = None

    async def refreshed(self) -> Measured | None:
        """The newest one; where it is old, another is on its way. Only the first is waited for."""
        self._raise_its_error()
        if self._task is None and self._is_due(self._every_s):
            self._task = asyncio.create_task(self._measure(self._keeper.supervisor.generation))
        if self.newest is None and self._task is not None:
            await asyncio.wait((self._task,))  # a client that leaves does not cancel it
            self._raise_its_error()
        return self.newest

    def watch(self) -> None:
        """Begin a measurement where nobody has asked for long, or nobody has of this life.

        Raises nothing: it is called where an error would end the replica.
        """
        try:
            self._raise_its_error()
        except Exception:
            # Not `log.exception`: it may print local variables, and keys are among them.
            log.error("not_measured", model=self._keeper.model, error=traceback.format_exc())
        if self._task is None and self._is_due(WATCH_EVERY_S):
            self._task = asyncio.create_task(self._measure(self._keeper.supervisor.generation))

    def _is_due(self, every_s: float) -> bool:
        newest = self.newest
        return self._keeper.is_serving and (
            newest is None
            or newest.generation != self._keeper.supervisor.generation
            or self._clock() - newest.at_s > every_s
        )

    async def _measure(self, generation: int) -> None:
        try:
            measurement = await self._keeper.engine.measure()
        except EngineDied:
            return  # the keeper hears of it by itself, and the last one stands
        if self._keeper.is_serving and self._keeper.supervisor.generation == generation:
            at_s = self._clock()
            self.newest = Measured(measurement=measurement, generation=generation, at_s=at_s)
            settings = self._keeper.settings
            if self._on_measured is not None and settings is not None:
                await asyncio.to_thread(self._on_measured, self.newest, settings)

    def _raise_its_error(self) -> None:
        """A bug in the background is heard by whoever asks next."""
        if self._task is not None and self._task.done():
            task, self._task = self._task, None
            task.result()
