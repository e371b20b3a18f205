"""Notes of every token on its way up, for a relay that keeps them while this replica may die.

Stands between a keeper and the layer that makes text of its tokens. A request that another replica
has begun comes with that replica's notes: the layer is told its tokens again, and the engine goes
on behind them. What is text, a stop string or a log probability is the layer's business again.
"""

import json
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

from deployments.engines.protocol import Delta, Step

R = TypeVar("R", contravariant=True)
D = TypeVar("D", bound=Delta)


class Copy:
    """The notes of one HTTP request, of all its choices."""

    def __init__(self, notes: bytes = b"") -> None:
        self._told: dict[str, list[Any]] = {}
        self._news: list[bytes] = []
        self._num_keys = 0
        for line in notes.splitlines():
            key, note = json.loads(line)
            self._told.setdefault(key, []).append(note)

    def told(self, key: str) -> Sequence[Any]:
        """What earlier replicas noted of one choice."""
        return self._told.get(key, ())

    def note(self, key: str, note: Any) -> None:
        self._news.append(_encode([key, note]))

    def take(self) -> bytes:
        """What was noted since the last call."""
        news = b"".join(self._news)
        self._news.clear()
        return news

    def next_number(self) -> int:
        """For engines whose requests have no names that another replica would give them too."""
        self._num_keys += 1
        return self._num_keys - 1


# Set where a relay's request enters the replica; whatever happens for it inherits it.
CURRENT: ContextVar[Copy | None] = ContextVar("ballast_copy", default=None)


class Notation(Protocol[R, D]):
    """An engine's requests and deltas in JSON."""

    def key(self, copy: Copy, request: R) -> str:
        """Names the choice, the same in every replica."""

    def can_continue(self, request: R) -> bool:
        """False: the engine has to begin again, for something that comes only at its beginning."""

    def write(self, delta: D) -> Any: ...

    def read(self, request_id: str, note: Any) -> Sequence[D]:
        """Cut so that the layer makes of them what it made of the delta that was noted."""

    def step(self, deltas: Sequence[D]) -> Step: ...


class Taker(Protocol[R]):
    """What is needed of `Keeper`."""

    async def generate(
        self, request_id: str, request: R, *, total_tokens: int, emitted: Sequence[int] = ()
    ) -> None: ...
    async def abort(self, request_ids: Sequence[str]) -> None: ...


@dataclass(slots=True)
class Copies(Generic[R, D]):
    """`Taker` for the layer above, and the step handler for the keeper below."""

    notation: Notation[R, D]
    tell: Callable[[Step], None]  # the layer's own step handler
    _keeper: Taker[R] | None = None
    _open: dict[str, tuple[Copy, str]] = field(default_factory=dict)

    def above(self, keeper: Taker[R]) -> Self:
        self._keeper = keeper
        return self

    def on_step(self, step: Step) -> None:
        """Noted first, then told: what a client sees is always in its relay's notes."""
        for delta in step.outputs:
            found = self._open.get(delta.request_id)
            if found is not None:
                copy, key = found
                copy.note(key, self.notation.write(delta))  # type: ignore[arg-type]
                if delta.finished:
                    del self._open[delta.request_id]
        self.tell(step)

    async def generate(self, request_id: str, request: R, *, total_tokens: int) -> None:
        assert self._keeper is not None, "Copies.above comes first"
        copy = CURRENT.get()
        if copy is None:
            return await self._keeper.generate(request_id, request, total_tokens=total_tokens)
        key = self.notation.key(copy, request)
        notes = copy.told(key) if self.notation.can_continue(request) else ()
        told = [delta for note in notes for delta in self.notation.read(request_id, note)]
        if told:
            self.tell(self.notation.step(told))
            if told[-1].finished:
                return
        self._open[request_id] = (copy, key)
        emitted = tuple(token for delta in told for token in delta.new_token_ids)
        try:
            await self._keeper.generate(
                request_id, request, total_tokens=total_tokens, emitted=emitted
            )
        except BaseException:
            self._open.pop(request_id, None)
            raise

    async def abort(self, request_ids: Sequence[str]) -> None:
        assert self._keeper is not None, "Copies.above comes first"
        for request_id in request_ids:
            self._open.pop(request_id, None)
        await self._keeper.abort(request_ids)


def _encode(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"
