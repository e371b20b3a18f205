"""How often the requests of one HTTP call went to another engine, for the head of its answer."""

from contextvars import ContextVar
from typing import Any

from deployments.journal import Entry

REPLAYED_HEADER = "x-ballast-replayed"

# A list for each call; whatever happens for the call inherits it.
_ENTRIES: ContextVar[list[Entry[Any]] | None] = ContextVar("ballast_entries", default=None)


def begin() -> list[Entry[Any]]:
    """From here on, the entries that this call makes in the journal."""
    entries: list[Entry[Any]] = []
    _ENTRIES.set(entries)
    return entries


def note(entry: Entry[Any]) -> None:
    """It is the present call's, if there is one."""
    entries = _ENTRIES.get()
    if entries is not None:
        entries.append(entry)


def header_of(entries: list[Entry[Any]]) -> str | None:
    """The header's value; None where nothing was replayed so far."""
    num_replays = sum(entry.replays for entry in entries)
    return str(num_replays) if num_replays else None
