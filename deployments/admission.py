"""Where new requests wait while the engine is starting again. Knows no engine and no HTTP."""

import asyncio

from deployments.errors import GONE_RETRY_AFTER_S, Busy


class WaitingRoom:
    """Its door is open while the engine takes requests; who comes before that waits, bounded."""

    def __init__(self, model: str) -> None:
        self.num_waiting = 0
        self._model = model
        self._answered = asyncio.Event()  # the door is open, or will never be again
        self._is_gone = False

    @property
    def is_open(self) -> bool:
        return self._answered.is_set() and not self._is_gone

    def open(self) -> None:
        self._answered.set()

    def close(self) -> None:
        if not self._is_gone:
            self._answered.clear()

    def close_for_good(self) -> None:
        """Who waits is sent away now, and who comes later at once."""
        self._is_gone = True
        self._answered.set()

    async def enter(self, *, wait_s: float, max_waiting: int) -> None:
        """Return when the engine can take a request; raise `Busy` when that takes too long."""
        if not self._answered.is_set():
            await self._wait(wait_s, max_waiting)
        if self._is_gone:
            reason = f"the engine of {self._model} is gone for good"
            raise Busy(reason, retry_after_s=GONE_RETRY_AFTER_S)

    async def _wait(self, wait_s: float, max_waiting: int) -> None:
        retry_after_s = max(1, round(wait_s))
        if self.num_waiting >= max_waiting:
            raise Busy(
                f"the engine of {self._model} is restarting and {self.num_waiting} requests "
                f"already wait for it (recovery.max_waiting)",
                retry_after_s=retry_after_s,
            )
        self.num_waiting += 1
        try:
            await asyncio.wait_for(self._answered.wait(), wait_s)
        except TimeoutError:
            raise Busy(
                f"the engine of {self._model} did not come back within {wait_s:.0f} s "
                f"(recovery.wait_s)",
                retry_after_s=retry_after_s,
            ) from None
        finally:
            self.num_waiting -= 1
