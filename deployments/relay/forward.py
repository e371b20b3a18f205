"""Carries one request from replica to replica until its answer is complete."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import structlog
from starlette.types import Message, Receive, Scope, Send

from deployments.errors import Busy
from deployments.openai.errors import answer_to
from deployments.openai.presence import WhileClientStays
from deployments.openai.wire import read_body
from deployments.relay.answer import RelayedAnswer
from deployments.relay.directory import Directory
from deployments.relay.frames import BrokenFrameError, Frame, FrameReader, Kind, encode
from deployments.relay.heads import RequestHead
from deployments.relay.port import Address

_CONNECT_S = 5.0
_RETRY_AFTER_S = 30

log = structlog.get_logger(__name__)


class ReplicaLostError(Exception):
    """The connection ended before the answer did, or nothing was heard for too long."""


class _ClientGoneError(Exception):
    """Nobody is left to be told."""


class Forward:
    """An ASGI application: the model, as long as any replica of it comes up in time."""

    def __init__(
        self,
        model: str,
        directory: Directory,
        *,
        wait_s: float,
        silence_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wait_s` bounds each wait for a replica, `silence_s` that for a sign of life of one."""
        self.num_resumed = 0
        self._model = model
        self._directory = directory
        self._wait_s = wait_s
        self._silence_s = silence_s
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(receive)
        if body is None:
            return
        head = RequestHead.of(scope, request_id=uuid.uuid4().hex)
        await WhileClientStays(lambda send: self._answer(head, body, send))(scope, receive, send)

    async def _answer(self, head: RequestHead, body: bytes, send: Send) -> None:
        answer = RelayedAnswer(head.path)
        try:
            while not answer.is_done:
                problem = answer.begin()
                if problem is not None:
                    raise Busy(problem, retry_after_s=_RETRY_AFTER_S)
                await self._one_replica(head, body, answer, send)
        except Busy as error:
            await _tell(send, answer.give_up(answer_to(error)))
        except _ClientGoneError:
            return

    async def _one_replica(
        self, head: RequestHead, body: bytes, answer: RelayedAnswer, send: Send
    ) -> None:
        """Ends with the answer or with the replica; `Busy` if there is none to be had in time."""
        deadline_s = self._clock() + self._wait_s
        while True:
            address = await self._directory.pick(wait_s=max(0.0, deadline_s - self._clock()))
            has_begun = False
            try:
                with self._directory.occupied(address):
                    async with _asked(address, head, answer.notes, body) as frames:
                        has_begun = True
                        while not answer.is_done:
                            await _tell(send, answer.hear(await self._heard(frames)))
                return
            except (ReplicaLostError, BrokenFrameError, OSError) as error:
                self._directory.suspect(address)
                log.warning(
                    "replica_lost", model=self._model, replica=address.replica,
                    has_begun=has_begun, error=f"{type(error).__name__}: {error}",
                )  # fmt: skip
                if has_begun:
                    self.num_resumed += 1
                    return

    async def _heard(self, frames: FrameReader) -> Frame:
        """A replica beats once a second: a longer silence is the end of it."""
        try:
            frame = await frames.read(timeout_s=self._silence_s)
        except TimeoutError:
            raise ReplicaLostError(f"silent for {self._silence_s:g} s") from None
        if frame is None:
            raise ReplicaLostError("it closed the connection")
        return frame


async def _tell(send: Send, messages: Sequence[Message]) -> None:
    try:
        for message in messages:
            await send(message)
    except OSError as error:
        raise _ClientGoneError from error


@asynccontextmanager
async def _asked(
    address: Address, head: RequestHead, notes: bytes, body: bytes
) -> AsyncIterator[FrameReader]:
    async with asyncio.timeout(_CONNECT_S):
        reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write(
            encode(Kind.SECRET, address.secret)
            + encode(Kind.REQUEST, head.encoded())
            + (encode(Kind.NOTES, notes) if notes else b"")
            + encode(Kind.BODY, body)
        )
        yield FrameReader(reader)
    finally:
        writer.transport.abort()
