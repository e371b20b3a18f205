"""Hands the journal over to a new life of the engine, each request from its last emitted token."""

import asyncio
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Generic, TypeVar

import structlog

from deployments.engines.protocol import Engine
from deployments.errors import BallastError, EngineDied, Invalid
from deployments.journal import Journal
from deployments.quarantine import Quarantine

R = TypeVar("R")
log = structlog.get_logger(__name__)


class Handover(Generic[R]):
    """Replays what was in flight: the innocent first, then each suspect alone."""

    def __init__(
        self,
        engine: Engine[R],
        journal: Journal[R],
        quarantine: Quarantine,
        *,
        isolation_s: float,
        on_refusal: Callable[[str, BallastError], None],
    ) -> None:
        self.num_replayed = 0
        self._engine = engine
        self._journal = journal
        self._quarantine = quarantine
        self._isolation_s = isolation_s
        self._on_refusal = on_refusal
        self._is_dead = False  # the life that is being handed to
        self._news = asyncio.Event()

    def notice(self, *, is_dead: bool = False) -> None:
        """Tokens came, a client left, or the life ended."""
        self._is_dead = self._is_dead or is_dead
        self._news.set()

    async def replay(self, generation: int) -> bool:
        """Give life `generation` everything that it has not had; False: it died meanwhile."""
        self._is_dead = False
        suspects = self._quarantine.suspects(self._journal.request_ids())
        if not await self._give(generation, without=suspects):
            return False
        if not suspects:
            return True
        # Bounded: who waits at the door waits for this, too.
        if not await self._until(
            lambda: not self._journal.num_emitted(generation), self._isolation_s
        ):
            return False
        for request_id in suspects:
            if not await self._try(generation, request_id):
                return False
        return await self._give(generation)  # who came meanwhile

    async def _give(
        self, generation: int, *, without: Collection[str] = (), only: str | None = None
    ) -> bool:
        while entry := self._journal.hand_over(generation, without=without, only=only):
            self.num_replayed += entry.replays > 0
            try:
                await self._engine.generate(entry.request, tuple(entry.emitted))
            except EngineDied:
                return False  # its listener says of what
            except Invalid as error:  # it came while there was no engine to look at it
                log.warning("replay_refused", request_id=entry.request_id, error=str(error))
                self._journal.release(entry.request_id)
                self._on_refusal(entry.request_id, error)
        return not self._is_dead

    async def _try(self, generation: int, request_id: str) -> bool:
        """Until it has passed the token at which it died, has ended, or the engine has."""
        if request_id not in self._journal:
            return True  # its client left
        enough = self._quarantine.pass_at_tokens(request_id)

        def has_passed() -> bool:
            return self._journal.num_emitted(generation).get(request_id, enough) >= enough

        log.warning("suspect_tried_alone", request_id=request_id)
        self._quarantine.on_trial = request_id
        if not await self._give(generation, only=request_id) or not await self._until(has_passed):
            return False
        self._quarantine.clear(request_id)
        log.info("suspect_cleared", request_id=request_id)
        return True

    async def _until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait for it, or for `timeout_s`; False: the life ended meanwhile."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._is_dead and not condition():
                    self._news.clear()
                    await self._news.wait()
        return not self._is_dead
