"""An event stream that is told again from its start, without what its client already has.

A new replica gives the whole answer once more, out of the tokens that the client has seen; events
may be cut otherwise than before. Knows the shape of OpenAI's chunks, and nothing of connections.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

DONE = b"[DONE]"
_SPACE = b"\n\n"
# Said once of a choice or of a tool call; every other text and list in a choice is continued.
_ONCE = frozenset(
    {"role", "id", "type", "name", "finish_reason", "stop_reason", "prompt_token_ids",
     "prompt_logprobs"}
)  # fmt: skip
_NUMBER = "index"
_OF_THE_ANSWER = ("id", "created")

Path = tuple[str | int, ...]


class SeamMismatchError(Exception):
    """The answer that was told again is another one."""


@dataclass(slots=True)
class Told:
    """What a client has been told of one answer."""

    texts: dict[Path, str] = field(default_factory=dict)
    lengths: dict[Path, int] = field(default_factory=dict)
    once: set[Path] = field(default_factory=set)
    of_the_answer: dict[str, Any] = field(default_factory=dict)
    has_usage: bool = False
    is_over: bool = False

    @classmethod
    def by(cls, events: Iterable[bytes]) -> "Told":
        told = cls()
        for event in events:
            told._hear(event)
        return told

    def _hear(self, event: bytes) -> None:
        data = data_of(event)
        if data == DONE:
            self.is_over = True
            return
        chunk = _chunk(data)
        if chunk is None:
            return
        for name in _OF_THE_ANSWER:
            if name in chunk:
                self.of_the_answer.setdefault(name, chunk[name])
        self.has_usage = self.has_usage or not chunk["choices"]
        for choice in chunk["choices"]:
            for path, value in _leaves(choice, (choice[_NUMBER],)):
                match value:
                    case str() if path[-1] not in _ONCE:
                        self.texts[path] = self.texts.get(path, "") + value
                    case list() if path[-1] not in _ONCE:
                        self.lengths[path] = self.lengths.get(path, 0) + len(value)
                    case _:
                        self.once.add(path)


class Seam:
    """Passes on what is new in a stream that is told again."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._texts = dict(told.texts)  # what has still to be told again
        self._lengths = dict(told.lengths)

    def feed(self, event: bytes) -> bytes:
        """The event without what was told, or nothing. Raises `SeamMismatchError`."""
        data = data_of(event)
        if data == DONE:
            self._check_all_told()
            return b"" if self._told.is_over else event
        chunk = _chunk(data)
        if chunk is None:
            return event
        chunk |= self._told.of_the_answer
        if not chunk["choices"] and self._told.has_usage:
            return b""
        choices = [choice for choice in chunk["choices"] if self._trim(choice)]
        if chunk["choices"] and not choices:
            return b""
        chunk["choices"] = choices
        return b"data: " + _dump(chunk) + _SPACE

    def _trim(self, choice: dict[str, Any]) -> bool:
        """Take out what was told; False: nothing else is in it."""
        news = self._trimmed(choice, (choice[_NUMBER],))
        if choice.get("finish_reason"):
            self._check_all_told(choice[_NUMBER])
        return news

    def _trimmed(self, value: dict[str, Any], path: Path) -> bool:
        has_news = False
        for key in list(value):
            here, item = (*path, key), value[key]
            match item:
                case dict():
                    is_new = self._trimmed(item, here)
                    if not is_new and key == "logprobs":
                        value[key] = None
                case [{"index": int()}, *_]:  # tool calls
                    kept = [part for part in item if self._trimmed(part, (*here, part[_NUMBER]))]
                    is_new = bool(kept)
                    if kept:
                        value[key] = kept
                    else:
                        del value[key]
                case None:
                    is_new = False
                case _ if key == _NUMBER:
                    is_new = False
                case _ if key in _ONCE or not isinstance(item, str | list):
                    is_new = here not in self._told.once
                    if not is_new:
                        del value[key]
                case str():
                    value[key] = self._new_text(here, item)
                    is_new = bool(value[key])
                case _:
                    num_told = min(self._lengths.get(here, 0), len(item))
                    self._lengths[here] = self._lengths.get(here, 0) - num_told
                    value[key] = item[num_told:]
                    is_new = bool(value[key])
            has_news = has_news or is_new
        return has_news

    def _new_text(self, path: Path, text: str) -> str:
        expected = self._texts.get(path, "")
        if not expected:
            return text
        if not (expected.startswith(text) or text.startswith(expected)):
            raise SeamMismatchError(_difference(path))
        self._texts[path] = expected[len(text) :]
        return text[len(expected) :]

    def _check_all_told(self, choice: int | None = None) -> None:
        for path, text in self._texts.items():
            if text and choice in (None, path[0]):
                raise SeamMismatchError(_difference(path))


def data_of(event: bytes) -> bytes:
    """The data of one event; empty for a comment."""
    lines = (line for line in event.splitlines() if line.startswith(b"data:"))
    return b"\n".join(line.removeprefix(b"data:").strip() for line in lines)


def split_events(data: bytes) -> tuple[list[bytes], bytes]:
    """Whole events, each with the empty line that ends it, and the beginning of the next one."""
    *events, rest = data.split(_SPACE)
    return [event + _SPACE for event in events], rest


def _chunk(data: bytes) -> dict[str, Any] | None:
    """A chunk of an answer; None for anything else, an error among it."""
    try:
        chunk = json.loads(data)
    except ValueError:
        return None
    match chunk:
        case {"choices": [*_]}:
            return dict(chunk)
    return None


def _leaves(value: dict[str, Any], path: Path) -> Iterable[tuple[Path, Any]]:
    for key, item in value.items():
        match item:
            case None:
                pass
            case _ if key == _NUMBER:
                pass
            case dict():
                yield from _leaves(item, (*path, key))
            case [{"index": int()}, *_]:
                for part in item:
                    yield from _leaves(part, (*path, key, part[_NUMBER]))
            case _:
                yield (*path, key), item


def _dump(chunk: dict[str, Any]) -> bytes:
    return json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode()


def _difference(path: Path) -> str:
    return f"choice {path[0]}: {'.'.join(map(str, path[1:]))} is not what the client has"
