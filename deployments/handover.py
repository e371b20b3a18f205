"""Hands the journal over to a new life of the engine, each request from its last emitted token."""

from typing import Generic, TypeVar

from deployments.engines.protocol import Engine
from deployments.errors import EngineDied
from deployments.journal import Journal

R = TypeVar("R")


class Handover(Generic[R]):
    """Replays what was in flight; knows nothing of why the last life ended."""

    def __init__(self, engine: Engine[R], journal: Journal[R]) -> None:
        self.num_replayed = 0
        self._engine = engine
        self._journal = journal

    async def replay(self, generation: int) -> bool:
        """Give life `generation` everything that it has not had; False: it died meanwhile."""
        while (entry := self._journal.hand_over(generation)) is not None:
            self.num_replayed += entry.replays > 0
            try:
                await self._engine.generate(entry.request, tuple(entry.emitted))
            except EngineDied:
                return False  # its listener says of what
        return True
