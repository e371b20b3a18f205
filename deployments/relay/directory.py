"""The replicas that a relay may ask, and how many requests each one has of it."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from deployments.errors import Busy
from deployments.relay.port import Address


class Directory:
    """Knows what it was told last; a replica that failed is out of it until it is told again."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._known: tuple[Address, ...] = ()
        self._num_open: Counter[Address] = Counter()
        self._is_known = asyncio.Event()

    @property
    def known(self) -> tuple[Address, ...]:
        return self._known

    def update(self, addresses: Sequence[Address]) -> None:
        self._known = tuple(addresses)
        if self._known:
            self._is_known.set()
        else:
            self._is_known.clear()

    def suspect(self, address: Address) -> None:
        """It did not answer: nobody else need try before it says again that it is there."""
        self.update([known for known in self._known if known != address])

    async def pick(self, *, wait_s: float) -> Address:
        """The replica with the fewest requests; raises `Busy` if there is none for `wait_s`."""
        try:
            async with asyncio.timeout(wait_s):
                while not self._known:
                    await self._is_known.wait()
        except TimeoutError:
            raise Busy(
                f"no replica of {self._model} came up within {wait_s:.0f} s (recovery.wait_s)",
                retry_after_s=max(1, round(wait_s)),
            ) from None
        return min(self._known, key=lambda address: self._num_open[address])

    @contextmanager
    def occupied(self, address: Address) -> Iterator[None]:
        self._num_open[address] += 1
        try:
            yield
        finally:
            self._num_open[address] -= 1
            if not self._num_open[address]:
                del self._num_open[address]
