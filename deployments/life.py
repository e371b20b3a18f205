"""One life of an engine: its load, its voice, and what the watcher is told of it.

Knows no supervisor. Times are of the monotonic clock.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from deployments.engines.protocol import LoadFailed, Step
from deployments.oom import Death
from deployments.watchdog import Watched


class Life:
    """The listener of one life; its keeper hears whose voice it is."""

    def __init__(
        self,
        generation: int,
        on_step: Callable[[int, Step], None],
        on_death: Callable[[int, Death], None],
    ) -> None:
        self.generation = generation
        self._on_step = on_step
        self._on_death = on_death
        self._heard_at_s = time.monotonic()
        self._loading: asyncio.Task[None] | None = None
        self._end: Death | None = None  # that it was given while it loaded

    def stepped(self, step: Step) -> None:
        self._heard_at_s = time.monotonic()
        self._on_step(self.generation, step)

    def died(self, death: Death) -> None:
        self._on_death(self.generation, death)

    async def load(self, start: Coroutine[Any, Any, None]) -> None:
        """Wait for `Engine.start`. Raises `LoadFailed`: with its own death, or that of `end`."""
        self._heard_at_s = time.monotonic()
        self._loading = asyncio.get_running_loop().create_task(start)
        try:
            await self._loading
        except asyncio.CancelledError:
            self._loading.cancel()  # if it is the waiter who is cancelled
            if self._end is None:
                raise
        finally:
            self._loading = None
            self._heard_at_s = time.monotonic()
        if self._end is not None:
            raise LoadFailed(self._end)

    def end(self, death: Death) -> None:
        """It stands still: it is over. What is left of it is for `Engine.stop` to end."""
        if self._loading is None:
            self.died(death)
        else:
            self._end = death
            self._loading.cancel()

    def watched(self, num_running: int) -> Watched:
        return Watched(
            generation=self.generation,
            heard_at_s=self._heard_at_s,
            is_loading=self._loading is not None,
            num_running=num_running,
        )
