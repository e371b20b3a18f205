"""Bytes off and onto an ASGI connection: bodies and server-sent events. Knows no model."""

import json
from collections.abc import Mapping

from starlette.types import Message, Receive, Send

DONE = b"data: [DONE]\n\n"
_EVENT_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would collect the events
}


async def read_body(receive: Receive) -> bytes | None:
    """The whole body; None when the client left before its end."""
    chunks = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def replay_body(body: bytes, receive: Receive) -> Receive:
    """Receives a body that was read already, then what else the client does."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


async def send_json(
    send: Send, body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> None:
    """A whole response."""
    described = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **(headers or {}),
    }
    await send({"type": "http.response.start", "status": status, "headers": _raw(described)})
    await send({"type": "http.response.body", "body": body})


class EventStream:
    """A response of events; its head goes out with the first of them.

    Until then an error can still have a status of its own.
    """

    def __init__(self, send: Send) -> None:
        self.has_started = False
        self._send = send

    async def write(self, events: bytes, *, last: bool = False) -> None:
        if not events and not last:
            return
        if not self.has_started:
            self.has_started = True
            start = {"type": "http.response.start", "status": 200, "headers": _raw(_EVENT_HEADERS)}
            await self._send(start)
        await self._send({"type": "http.response.body", "body": events, "more_body": not last})


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class TextFrame:
    """An event that is always the same but for one text.

    Cut out of one rendered event: 0.2 us for each further one, against 6.4 us for a pydantic
    model of it (openai 3.52, pydantic 2.14).
    """

    def __init__(self, empty: bytes, field: str) -> None:
        """`empty` is the event in which the text is empty."""
        key = f'"{field}":'.encode()
        # Can't stand elsewhere: within a string, the model's name say, the quotes are escaped.
        before, after = empty.split(key + b'""')
        self._before = before + key
        self._after = after

    def with_text(self, text: str) -> bytes:
        return self._before + _encode(text).encode() + self._after


_encode = json.JSONEncoder(ensure_ascii=False).encode


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]
