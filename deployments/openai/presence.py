"""Work that is worth doing only while the client is there."""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class WhileClientStays(Response):
    """A response that is made while it is sent, and cancelled when its client leaves.

    Covers the wait for the engine and for the first token too, which a StreamingResponse would
    spend before it listens.
    """

    def __init__(self, work: Callable[[Send], Awaitable[None]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._work(send))
        leaving = asyncio.ensure_future(_client_left(receive))
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            work.cancel()  # nothing, if it is done
            await asyncio.gather(work, leaving, return_exceptions=True)
        if not work.cancelled():
            work.result()


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
