"""The lives of one engine: how each is loaded, and what the watcher is told of the present one.

Knows no supervisor: it is told which life is to begin, and with what.
"""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from deployments.engines.protocol import Listener, LoadFailed, Step
from deployments.life import Life
from deployments.oom import Death
from deployments.watchdog import Watched
from vram.settings import EngineSettings

Start = Callable[[EngineSettings, Listener], Coroutine[Any, Any, None]]
PreCheck = Callable[[EngineSettings], Awaitable[EngineSettings]]


class Lives:
    """One after the other; at most one of them loads or serves."""

    def __init__(
        self,
        on_step: Callable[[int, Step], None],
        on_death: Callable[[int, Death], None],
        before_load: PreCheck | None = None,
    ) -> None:
        self.settings: EngineSettings | None = None  # what the engine was last started with
        self.tried: EngineSettings | None = None  # what its last life was to run with
        self._on_step = on_step
        self._on_death = on_death
        self._before_load = before_load
        self._now: Life | None = None

    async def load(self, generation: int, settings: EngineSettings, start: Start) -> EngineSettings:
        """Begin a life with what the pre-check leaves of `settings`. Raises `LoadFailed`."""
        self.tried = settings
        try:
            if self._before_load is not None:
                self.tried = await self._before_load(settings)
            self._now = life = Life(generation, self._on_step, self._on_death)
            await life.load(start(self.tried, life))
        except LoadFailed:
            self._now = None
            raise
        self.settings = self.tried
        return self.tried

    def close(self) -> None:
        """The present one is over: it died, or is left."""
        self._now = None

    def watched(self, num_running: Callable[[int], int]) -> Watched | None:
        """The life that has to show that it is one; None while there is none."""
        if self._now is None:
            return None
        return self._now.watched(num_running(self._now.generation))

    def end(self, generation: int, death: Death) -> None:
        """A life that stands still is over, if it is still the present one."""
        if self._now is not None and generation == self._now.generation:
            self._now.end(death)
