"""Where a replica takes requests from relays: frames over TCP in, the ASGI application behind."""

import asyncio
import hmac
import secrets
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import structlog
from pydantic import ValidationError
from starlette.types import ASGIApp, Message

from deployments.relay.copies import CURRENT, Copy
from deployments.relay.frames import BrokenFrameError, Frame, FrameReader, Kind, encode
from deployments.relay.heads import RequestHead, ResponseHead

BEAT_S = 1.0
_SECRET_BYTES = 32
_HELLO_S = 5.0
_REQUEST_S = 60.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a replica listens, and the secret that opens it. Travels in Ray's calls only."""

    replica: str
    host: str
    port: int
    secret: bytes = field(repr=False)


class ReplicaPort:
    """One connection for each request; it ends with the answer, or with its relay."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        replica: str,
        has_given_up: Callable[[], bool],
        beat_s: float = BEAT_S,
    ) -> None:
        """After `has_given_up` nothing goes out: the request is another replica's."""
        self._app = app
        self._replica = replica
        self._has_given_up = has_given_up
        self._beat_s = beat_s
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self, host: str) -> Address:
        self._server = await asyncio.start_server(self._connected, host, 0)
        port = self._server.sockets[0].getsockname()[1]
        return Address(self._replica, host, port, self._secret)

    async def close(self) -> None:
        """End every connection."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._talk(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameReader(reader)
        try:
            if self._is_ours(await frames.read(timeout_s=_HELLO_S)):
                await self._serve(frames, writer)
        except (BrokenFrameError, OSError):  # a TimeoutError is one of them
            pass  # not one of our relays, or it has gone: nobody is left to be told
        finally:
            writer.transport.abort()

    def _is_ours(self, frame: Frame | None) -> bool:
        return (
            frame is not None
            and frame.kind is Kind.SECRET
            and hmac.compare_digest(frame.payload, self._secret)
        )

    async def _serve(self, frames: FrameReader, writer: asyncio.StreamWriter) -> None:
        said: dict[Kind, bytes] = {}
        while Kind.BODY not in said:
            frame = await frames.read(timeout_s=_REQUEST_S)
            if frame is None:
                return
            said[frame.kind] = frame.payload
        try:
            head = RequestHead.decoded(said.get(Kind.REQUEST, b""))
        except ValidationError as error:
            raise BrokenFrameError(f"no request: {error}") from None
        notes, body = said.get(Kind.NOTES, b""), said[Kind.BODY]
        exchange = _Exchange(self._app, writer, Copy(notes), self._has_given_up)
        answering = asyncio.create_task(exchange.answer(head, body, frames))
        beating = asyncio.create_task(self._beat(exchange))
        try:
            await answering
        finally:
            for task in (beating, answering):
                task.cancel()
            await asyncio.gather(beating, answering, return_exceptions=True)

    async def _beat(self, exchange: "_Exchange") -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            exchange.beat()


class _Exchange:
    """One request."""

    def __init__(
        self,
        app: ASGIApp,
        writer: asyncio.StreamWriter,
        copy: Copy,
        has_given_up: Callable[[], bool],
    ) -> None:
        self._app = app
        self._writer = writer
        self._copy = copy
        self._has_given_up = has_given_up

    async def answer(self, head: RequestHead, body: bytes, frames: FrameReader) -> None:
        CURRENT.set(self._copy)  # of this task and those that it starts
        parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        # A task, because an application may listen twice at once, and a stream's reader may not.
        leaving = asyncio.create_task(_relay_left(frames))

        async def receive() -> Message:
            if parts:
                return parts.pop()
            await asyncio.wait((leaving,))
            return {"type": "http.disconnect"}

        try:
            await self._app(head.scope(), receive, self._send)
        except OSError:
            raise
        except Exception:
            # Not `log.exception`: it may print local variables, and keys are among them.
            log.error("relayed_request_failed", path=head.path, error=traceback.format_exc())
            self._write(encode(Kind.FAILED))
        finally:
            leaving.cancel()
        self._writer.close()
        await self._writer.wait_closed()  # it is all out

    def beat(self) -> None:
        self._write(self._news() + encode(Kind.BEAT))

    async def _send(self, message: Message) -> None:
        if self._has_given_up():
            self._writer.transport.abort()
            raise ConnectionAbortedError("the replica has given up: the request is not its own")
        if message["type"] == "http.response.start":
            self._write(encode(Kind.HEAD, ResponseHead.of(message).encoded()))
            return
        parts = [self._news(), encode(Kind.BODY, message.get("body", b""))]
        if not message.get("more_body", False):
            parts.append(encode(Kind.END))
        self._write(b"".join(parts))
        await self._writer.drain()

    def _news(self) -> bytes:
        notes = self._copy.take()
        return encode(Kind.NOTES, notes) if notes else b""

    def _write(self, data: bytes) -> None:
        if not self._writer.is_closing():
            self._writer.write(data)


async def _relay_left(frames: FrameReader) -> None:
    """A relay says nothing after its request: it can only go."""
    with suppress(OSError, BrokenFrameError):
        await frames.read()
