"""One load of an engine, which can be ended from outside. Knows no supervisor."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from deployments.engines.protocol import LoadFailed
from deployments.oom import Death


class Loading:
    """Waits for `Engine.start`, or for somebody who says that it takes too long."""

    def __init__(self) -> None:
        self.began_at_s = time.monotonic()
        self._death: Death | None = None
        self._task: asyncio.Task[None] | None = None

    async def run(self, start: Coroutine[Any, Any, None]) -> None:
        """Raises `LoadFailed`: with its own death, or with the one that `end` gave it."""
        self._task = asyncio.get_running_loop().create_task(start)
        try:
            await self._task
        except asyncio.CancelledError:
            self._task.cancel()  # if it is the waiter who is cancelled
            if self._death is None:
                raise
        if self._death is not None:
            raise LoadFailed(self._death)

    def end(self, death: Death) -> None:
        """What it has started is for `Engine.stop` to end."""
        self._death = death
        if self._task is not None:
            self._task.cancel()
