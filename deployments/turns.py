"""Calls take turns on their way to the engine, so that the first of many is there at once.

A burst of calls passes an event loop in step: every one is parsed before the first is tokenized,
and every one is tokenized before the first is handed over; meanwhile the engine has nothing to do.
By turns the engine computes while the others are parsed. What it gives: docs/log.md.
"""

import asyncio
from collections import deque
from contextvars import ContextVar
from types import TracebackType

# One call needs about a millisecond. Who needs more (a long prompt is tokenized in a thread, a
# request waits for a slow template) lets the others pass.
LIMIT_S = 5e-3


class Turn:
    """One call on its way; over when its block is left, when `over` is called, or after a while."""

    def __init__(self, turns: "Turns", limit_s: float) -> None:
        self._turns = turns
        self._is_over = False
        self._timer = asyncio.get_running_loop().call_later(limit_s, self.end)

    def end(self) -> None:
        """Let the next one go; again does nothing."""
        if self._is_over:
            return
        self._is_over = True
        self._timer.cancel()
        self._turns.pass_on()

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()


# Whatever happens for a call inherits its turn.
_PRESENT: ContextVar[Turn | None] = ContextVar("ballast_turn", default=None)


def over() -> None:
    """The present call's request goes to the engine now; without a turn this does nothing."""
    turn = _PRESENT.get()
    if turn is not None:
        turn.end()


class Turns:
    """First come, first served. For one event loop."""

    def __init__(self, *, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._is_taken = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> Turn:
        """Wait for the ones before; the turn that the present call now has."""
        if self._is_taken:
            await self._wait()
        self._is_taken = True
        turn = Turn(self, self._limit_s)
        _PRESENT.set(turn)
        return turn

    def pass_on(self) -> None:
        """To the next that still waits."""
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():  # else its client left
                waiting.set_result(None)
                return
        self._is_taken = False

    async def _wait(self) -> None:
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        try:
            await waiting
        except asyncio.CancelledError:
            if not waiting.cancelled():  # cancelled in the moment in which its turn came
                self.pass_on()
            raise
