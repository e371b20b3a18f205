"""How large a body may be."""

import asyncio
from collections.abc import Awaitable
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.openai.errors import ErrorAnswer

MAX_BODY_BYTES = 8 * 2**20
LINGER_BYTES = 64 * 2**20
LINGER_S = 2.0


class BodyLimit:
    """413 for a larger body, whether it says its length or is sent in chunks.

    Keeps nothing of a body that says it is too large, and of chunks no more than the limit. The
    answer goes out at once; what the client still sends is thrown away for a moment, because a
    connection closed on unread bytes is reset, and then many clients never see the answer (seen:
    httpx 0.28 raises ReadError).
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        linger_bytes: int = LINGER_BYTES,
        linger_s: float = LINGER_S,
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._linger_bytes = linger_bytes
        self._linger_s = linger_s
        self._answer = ErrorAnswer(
            status=413,
            message=f"The body is larger than {max_body_bytes} bytes (limits.max_body_bytes).",
            code="body_too_large",
            headers={"connection": "close"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        if _content_length(headers) > self._max_body_bytes:
            # Who expects 100 Continue has not begun, and reading would tell him to.
            is_coming = "expect" not in headers
            return await self._refuse(receive if is_coming else None, send)
        num_bytes, is_over, is_complete, has_started = 0, False, False, False

        async def counted_receive() -> Message:
            nonlocal num_bytes, is_over, is_complete
            message = await receive()
            is_complete = is_complete or not message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            if num_bytes <= self._max_body_bytes:
                return message
            is_over = True
            return {"type": "http.disconnect"}  # the application need not answer any more

        def counted_send(message: Message) -> Awaitable[None]:
            nonlocal has_started
            if is_over and not has_started:
                return _nothing()
            has_started = True
            return send(message)

        try:
            await self._app(scope, counted_receive, counted_send)
        except Exception:
            if not is_over:
                raise
        if is_over and not has_started:
            await self._refuse(None if is_complete else receive, send)

    async def _refuse(self, rest: Receive | None, send: Send) -> None:
        if rest is None:
            return await self._answer.send(send)

        async def send_open(message: Message) -> None:
            await send({**message, "more_body": True} if "body" in message else message)

        await self._answer.send(send_open)
        await self._throw_away(rest)
        await send({"type": "http.response.body", "body": b""})

    async def _throw_away(self, rest: Receive) -> None:
        num_bytes = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(self._linger_s):
                while num_bytes < self._linger_bytes:
                    message = await rest()
                    num_bytes += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return


async def _nothing() -> None:
    """What is sent of an answer that is refused."""


def _content_length(headers: Headers) -> int:
    """What the client says; what it really sends is counted."""
    digits = headers.get("content-length", "")[:20]  # Python refuses 5000 digits
    return int(digits) if digits.isdecimal() else 0
