"""What the processes of an engine leave behind when they die, as values and as lines of a file.

Written inside the engine's processes and read by the replica; imports neither engine nor torch.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from deployments.phases import Phase

_LONGEST_TEXT = 4000  # characters of one message: vLLM logs its whole configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class LastWord:
    """An exception, or a line that was logged as an error, in one process of an engine."""

    process_id: int
    errors: tuple[str, ...] = ()  # "module.Class: message", then what it was raised from
    logged: str = ""
    is_fatal: bool = False  # it came out of the worker: this is no error that somebody handled
    phase: Phase | None = None
    device_type: str = ""  # "cuda" or "cpu"
    requests: tuple[str, ...] = ()  # ids in the batch
    free_bytes: int | None = None  # on the device, after the exception
    total_bytes: int | None = None
    reserved_bytes: int | None = None  # by the allocator, and not in use

    @property
    def text(self) -> str:
        return "\n".join(self.errors) or self.logged

    def line(self) -> str:
        """One line of JSON, without what is not known."""
        known = {key: value for key, value in asdict(self).items() if value not in (None, "", ())}
        return json.dumps(known)


def read_lines(lines: Iterable[str]) -> tuple[LastWord, ...]:
    """In the order of writing. A line that was cut off, by a kill, is read as a logged one."""
    return tuple(_read_line(line) for line in lines if line.strip())


def described(error: BaseException) -> tuple[str, ...]:
    """Each exception of the chain as "module.Class: message", the outermost first."""
    return tuple(
        f"{type(e).__module__}.{type(e).__qualname__}: {e}"[:_LONGEST_TEXT] for e in chain(error)
    )


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, then what it was raised from, then what it was raised during."""
    seen: set[int] = set()
    while isinstance(error, BaseException) and id(error) not in seen:
        seen.add(id(error))
        yield error
        # Ray has the exception of the other process in an attribute.
        found = getattr(error, "cause", None) or error.__cause__
        error = found or (None if error.__suppress_context__ else error.__context__)


def shortened(text: str) -> str:
    return text[:_LONGEST_TEXT]


def _read_line(line: str) -> LastWord:
    try:
        word = json.loads(line)
        return LastWord(**{**word, **_typed(word)})
    except (ValueError, TypeError):
        return LastWord(process_id=0, logged=shortened(line))


def _typed(word: dict[str, object]) -> dict[str, object]:
    """What JSON has no type for."""
    lists = {key: tuple(_strings(word.get(key))) for key in ("errors", "requests")}
    phase = word.get("phase")
    return {**lists, "phase": None if phase is None else Phase(str(phase))}


def _strings(value: object) -> Sequence[str]:
    return [str(each) for each in value] if isinstance(value, list) else []
