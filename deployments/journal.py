"""The requests in flight and the tokens that each client already has. Pure bookkeeping, no I/O."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

R = TypeVar("R")


@dataclass(slots=True, kw_only=True)
class Entry(Generic[R]):
    """One request in flight."""

    request_id: str
    request: R
    total_tokens: int  # prompt and all that it may still generate
    emitted: list[int] = field(default_factory=list)
    generation: int = 0  # the engine life that it was last handed to; 0: none yet
    replays: int = 0


class Journal(Generic[R]):
    """Admit a request before the engine hears of it; record a token before the client does.

    What is in here when an engine dies is what has to be replayed, and `emitted` is from where.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry[R]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def admit(self, request_id: str, request: R, *, total_tokens: int) -> Entry[R]:
        if request_id in self._entries:
            raise ValueError(f"request {request_id} is already in flight")
        entry = Entry(request_id=request_id, request=request, total_tokens=total_tokens)
        self._entries[request_id] = entry
        return entry

    def record(self, request_id: str, new_token_ids: Sequence[int], *, finished: bool) -> bool:
        """Note tokens about to be sent; False: nobody waits for them any more."""
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        if finished:
            del self._entries[request_id]
        else:
            entry.emitted.extend(new_token_ids)
        return True

    def release(self, request_id: str) -> None:
        """The client left, or the request ended above the engine (a stop string)."""
        self._entries.pop(request_id, None)

    def hand_over(
        self, generation: int, *, without: Collection[str] = (), only: str | None = None
    ) -> Entry[R] | None:
        """The oldest request that this life of the engine has not had, noted as handed to it.

        Ask until there is none: requests may come and go in between. `without` are left out;
        `only` is the one to be handed over.
        """
        for entry in self._entries.values():
            if entry.generation == generation or entry.request_id in without:
                continue
            if only in (None, entry.request_id):
                entry.replays += entry.generation > 0
                entry.generation = generation
                return entry
        return None

    def request_ids(self) -> tuple[str, ...]:
        """Of all in flight, the oldest first."""
        return tuple(self._entries)

    def num_emitted(self, generation: int) -> dict[str, int]:
        """How many tokens each request has that was handed to this life."""
        return {
            entry.request_id: len(entry.emitted)
            for entry in self._entries.values()
            if entry.generation == generation
        }

    @property
    def longest_request_tokens(self) -> int:
        """No step down may make the context shorter than this."""
        return max((entry.total_tokens for entry in self._entries.values()), default=0)

    def clear(self) -> tuple[Entry[R], ...]:
        """Give every request up; returns them so that their clients can be told."""
        entries = tuple(self._entries.values())
        self._entries.clear()
        return entries
