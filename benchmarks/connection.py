"""One connection of the load, and what is noted of a request while it runs: times and bytes."""

import asyncio
import time
from dataclasses import dataclass

END_OF_BODY = b"\n0\r\n\r\n"


@dataclass(slots=True)
class Exchange:
    """One request on the wire, as noted while it ran."""

    sent_s: float
    first_text_s: float | None = None
    last_byte_s: float | None = None
    received: bytes = b""
    failure: str | None = None


class Connection(asyncio.Protocol):
    """HTTP/1.1, kept alive. The end of an answer is seen in its last bytes."""

    def __init__(self, text_field: bytes) -> None:
        self._text_field = text_field
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[None] | None = None
        self._received = bytearray()
        self.is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def exchange(self, request: bytes, exchange: Exchange) -> None:
        assert self._transport is not None
        self._exchange, self._received = exchange, bytearray()
        self._done = asyncio.get_running_loop().create_future()
        exchange.sent_s = time.perf_counter()
        self._transport.write(request)
        await self._done
        exchange.received = bytes(self._received)

    def data_received(self, data: bytes) -> None:
        now_s, exchange = time.perf_counter(), self._exchange
        if exchange is None or self._done is None or self._done.done():
            self.close()
            return
        if exchange.first_text_s is None and self._has_text(data):
            exchange.first_text_s = now_s
        exchange.last_byte_s = now_s
        self._received += data
        if self._received.endswith(END_OF_BODY) or self._is_complete_error():
            self._done.set_result(None)

    def _has_text(self, data: bytes) -> bool:
        at = data.find(self._text_field)
        while at >= 0:
            if data[at + len(self._text_field) :][:1] != b'"':
                return True
            at = data.find(self._text_field, at + 1)
        return False

    def _is_complete_error(self) -> bool:
        """Errors come with a length, not in chunks."""
        if self._received.startswith(b"HTTP/1.1 200"):
            return False
        head, separator, body = bytes(self._received).partition(b"\r\n\r\n")
        length = header(head, b"content-length")
        return bool(separator) and length is not None and len(body) >= int(length)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(f"connection closed: {exc or 'by server'}"))

    def close(self) -> None:
        self.is_closed = True
        if self._transport is not None:
            self._transport.abort()


def header(head: bytes, name: bytes) -> bytes | None:
    """Of the head of an answer; names and values in lower case."""
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip().lower()
    return None
