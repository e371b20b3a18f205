"""What an answer's head says of how it came about: its time, and whether it was replayed."""

import time
from collections.abc import Awaitable, Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import replays

RESPONSE_TIME = "x-response-time"


class ResponseTime:
    """`X-Response-Time`: milliseconds until the response's first byte, "12.3ms".

    The head waits for the first part of the body, so that for a stream it is the time to the
    first token and not that to a head which says nothing. For the same reason it knows by then
    whether a replay came before: `X-Ballast-Replayed`.
    """

    def __init__(self, app: ASGIApp, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began_s = self._clock()
        entries = replays.begin()
        head: Message | None = None
        has_begun = False

        def timed_send(message: Message) -> Awaitable[None]:
            # Every event of a stream comes by: no coroutine for it.
            return send(message) if has_begun else begin(message)

        async def begin(message: Message) -> None:
            nonlocal head, has_begun
            if message["type"] == "http.response.start":
                head = message
                return
            if head is not None:
                elapsed_ms = (self._clock() - began_s) * 1000
                headers = MutableHeaders(scope=head)
                headers[RESPONSE_TIME] = f"{elapsed_ms:.1f}ms"
                replayed = replays.header_of(entries)
                if replayed is not None:
                    headers[replays.REPLAYED_HEADER] = replayed
                start, head = head, None
                await send(start)
                has_begun = True
            await send(message)

        await self._app(scope, receive, timed_send)
