"""Looks after something again and again, beside everything else. Knows not what it looks at."""

import asyncio
import traceback
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger(__name__)


class Ticker:
    """Calls `look` every so often, first after one interval. An error of it is said and ends it."""

    def __init__(
        self, look: Callable[[], Awaitable[None]], *, every_s: float, model: str, failure: str
    ) -> None:
        self._look = look
        self._every_s = every_s
        self._model = model
        self._failure = failure  # the event in the log
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            # What ended it was said then: who stops it has an engine to end after that.
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while True:
                await asyncio.sleep(self._every_s)
                await self._look()
        except Exception:
            # Not `log.exception`: it may print local variables, and keys are among them.
            log.error(self._failure, model=self._model, error=traceback.format_exc())
            raise
