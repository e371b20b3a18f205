"""One stream of tokens for each consumer, out of the steps of a kept engine. Knows no HTTP."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Protocol, cast

from deployments.engines.protocol import Step, TokenDelta, TokenRequest
from deployments.errors import BallastError, LadderExhausted


class RequestTaker(Protocol):
    """What is needed of `Keeper[TokenRequest]`."""

    async def generate(
        self, request_id: str, request: TokenRequest, *, total_tokens: int
    ) -> None: ...
    async def abort(self, request_ids: Sequence[str]) -> None: ...


class Streams:
    """Hands each delta to the consumer that waits for it.

    The keeper takes `on_step` and `on_give_up` at its birth, so it is attached afterwards:

        streams = Streams()
        streams.attach(Keeper(..., on_step=streams.on_step, on_give_up=streams.on_give_up,
                              on_refusal=streams.on_refusal))
    """

    def __init__(self) -> None:
        self._keeper: RequestTaker | None = None
        self._inboxes: dict[str, Inbox] = {}

    def __len__(self) -> int:
        """Requests that somebody waits for."""
        return len(self._inboxes)

    def attach(self, keeper: RequestTaker) -> None:
        self._keeper = keeper

    def on_step(self, step: Step) -> None:
        for delta in step.outputs:
            inbox = self._inboxes.get(delta.request_id)
            if inbox is not None:
                inbox.put(cast(TokenDelta, delta))

    def on_give_up(self, error: LadderExhausted) -> None:
        for inbox in set(self._inboxes.values()):
            inbox.fail(error)

    def on_refusal(self, request_id: str, error: BallastError) -> None:
        inbox = self._inboxes.get(request_id)
        if inbox is not None:
            inbox.fail(error)

    def open(self, requests: Sequence[TokenRequest]) -> "Inbox":
        """Admit requests whose deltas one consumer wants, for as long as it stays inside."""
        assert self._keeper is not None, "Streams.attach comes first"
        return Inbox(self._keeper, self._inboxes, requests)

    async def stream(self, request: TokenRequest) -> AsyncIterator[TokenDelta]:
        """Admit a request and yield its tokens; a consumer that leaves aborts it."""
        async with self.open((request,)) as inbox:
            async for deltas in inbox:
                for delta in deltas:
                    yield delta


class Inbox:
    """The deltas of one consumer's requests, in the order in which they came.

    Each turn yields everything that arrived since the last one, so that a consumer who reads
    slowly does fewer and larger turns.
    """

    def __init__(
        self,
        keeper: RequestTaker,
        registry: dict[str, "Inbox"],
        requests: Sequence[TokenRequest],
    ) -> None:
        self._keeper = keeper
        self._registry = registry
        self._requests = requests
        self._running: set[str] = set()
        self._arrived: list[TokenDelta] = []
        self._error: BallastError | None = None
        self._news = asyncio.Event()

    async def __aenter__(self) -> "Inbox":
        try:
            for request in self._requests:
                self._registry[request.request_id] = self
                self._running.add(request.request_id)
                await self._keeper.generate(
                    request.request_id,
                    request,
                    total_tokens=len(request.prompt_token_ids) + request.sampling.max_tokens,
                )
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._leave()

    def __aiter__(self) -> "Inbox":
        return self

    async def __anext__(self) -> list[TokenDelta]:
        while True:
            arrived = [delta for delta in self._arrived if delta.request_id in self._running]
            self._arrived.clear()
            if arrived:
                self._running -= {delta.request_id for delta in arrived if delta.finished}
                return arrived
            if not self._running:
                raise StopAsyncIteration
            if self._error is not None:
                raise type(self._error)(
                    *self._error.args
                )  # one for each: a traceback is not shared
            self._news.clear()
            await self._news.wait()

    async def end(self, request_id: str) -> None:
        """One of the requests has all that it needs (a stop string, say)."""
        if request_id in self._running:
            self._running.discard(request_id)
            self._registry.pop(request_id, None)
            await self._keeper.abort((request_id,))

    def put(self, delta: TokenDelta) -> None:
        self._arrived.append(delta)
        self._news.set()

    def fail(self, error: BallastError) -> None:
        self._error = error
        self._news.set()

    async def _leave(self) -> None:
        for request in self._requests:
            self._registry.pop(request.request_id, None)
        left, self._running = tuple(self._running), set()
        if left:
            # Whoever cancels the consumer a second time must not stop the engine's slot from
            # being freed.
            await asyncio.shield(self._keeper.abort(left))
