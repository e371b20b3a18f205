"""What stands before a model's HTTP: a clock, keys, size, well-formed JSON, a wait for the engine.

Pure ASGI, so that a streamed byte passes through plain calls and nothing else. From the outside:

    ResponseTime(BodyLimit(ApiKeys(JsonGuard(Admission(app)))))

They log no request, and of a key they keep its digest only.
"""

import asyncio
import hashlib
import hmac
import os
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic_core import from_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import replays
from deployments.errors import Busy, Invalid
from deployments.openai.errors import ErrorAnswer, answer_to
from deployments.openai.wire import read_body, replay_body

MAX_BODY_BYTES = 8 * 2**20
LINGER_BYTES = 64 * 2**20
LINGER_S = 2.0
API_KEYS_VARIABLE = "BALLAST_API_KEYS"
OPEN_PATHS = frozenset({"/health", "/metrics"})
RESPONSE_TIME = "x-response-time"
_DIGEST_PREFIX = "sha256:"


def route_path(scope: Scope) -> str:
    """The path below where the application is mounted."""
    path: str = scope["path"]
    root = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def is_model_call(scope: Scope) -> bool:
    return (
        scope["type"] == "http"
        and scope["method"] == "POST"
        and route_path(scope).startswith("/v1/")
    )


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

        async def counted_send(message: Message) -> None:
            nonlocal has_started
            if not is_over or has_started:
                has_started = True
                await send(message)

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


def _content_length(headers: Headers) -> int:
    """What the client says; what it really sends is counted."""
    digits = headers.get("content-length", "")[:20]  # Python refuses 5000 digits
    return int(digits) if digits.isdecimal() else 0


@dataclass(frozen=True, slots=True)
class KeySet:
    """SHA-256 digests of the keys that open the door; none at all: it is open."""

    digests: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, keys: Iterable[str]) -> "KeySet":
        """From keys as they are, or as `sha256:` and the digest in hexadecimal digits."""
        return cls(tuple(map(_digest, keys)))

    def __len__(self) -> int:
        return len(self.digests)

    def accepts(self, key: bytes) -> bool:
        """Takes as long for every key: it is compared with all of them."""
        digest = hashlib.sha256(key).digest()
        found = False
        for known in self.digests:
            found |= hmac.compare_digest(known, digest)
        return found


def load_api_keys(file: Path | None, env: Mapping[str, str] = os.environ) -> KeySet:
    """One key a line, of the file or else of BALLAST_API_KEYS; `#` begins a comment line.

    Raises `Invalid` for a file without a key: that must not open the door.
    """
    if file is None:
        return KeySet.of(_lines(env.get(API_KEYS_VARIABLE, "")))
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise Invalid(f"api_keys_file {file} can't be read: {reason}", "api_keys_file") from None
    keys = KeySet.of(_lines(text))
    if not keys:
        raise Invalid(f"api_keys_file {file} has no key; one a line", "api_keys_file")
    return keys


def _lines(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _digest(key: str) -> bytes:
    if not key.startswith(_DIGEST_PREFIX):
        return hashlib.sha256(key.encode()).digest()
    try:
        digest = bytes.fromhex(key.removeprefix(_DIGEST_PREFIX))
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise Invalid("an API key begins with sha256: but no digest of 64 digits follows")
    return digest


class ApiKeys:
    """401 without a known key in `Authorization: Bearer` or `X-API-Key`."""

    def __init__(
        self, app: ASGIApp, keys: KeySet, *, open_paths: Collection[str] = OPEN_PATHS
    ) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self._keys or self._may_pass(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _UNKNOWN_KEY.send(send)

    def _may_pass(self, scope: Scope) -> bool:
        if route_path(scope) in self._open_paths:
            return True
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # Both: OpenAI's clients always send a bearer, if only a placeholder.
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        sent = (bearer, headers.get("x-api-key", ""))
        return any([self._keys.accepts(key.encode("latin-1")) for key in sent if key])


_UNKNOWN_KEY = ErrorAnswer(
    status=401,
    message="No known API key in the header Authorization: Bearer or X-API-Key.",
    code="invalid_api_key",
    headers={"www-authenticate": "Bearer"},
)


class JsonGuard:
    """400 for a body of a model call that is no JSON in UTF-8, before the application sees it.

    Applications that read it with Python's `json` answer some of these with a 500: bytes that
    are no UTF-8, half a surrogate pair, ten thousand brackets. One more parse costs 0.6 us for
    700 bytes and 3 to 115 ms for 8 MiB (pydantic-core 2.50).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_model_call(scope) or _is_multipart(scope):
            return await self._app(scope, receive, send)
        body = await read_body(receive)
        if body is None:
            return
        try:
            from_json(body, allow_inf_nan=False, cache_strings="none")
        except ValueError as error:
            message = f"The body is not valid JSON: {error}."
            await ErrorAnswer(status=400, message=message, code="invalid_json").send(send)
        else:
            await self._app(scope, replay_body(body, receive), send)


def _is_multipart(scope: Scope) -> bool:
    return Headers(scope=scope).get("content-type", "").startswith("multipart/")


class Admission:
    """A model call waits for the engine; 503 and Retry-After when that takes too long."""

    def __init__(self, app: ASGIApp, admission: Callable[[], Awaitable[None]]) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_model_call(scope):
            try:
                await self._admission()
            except Busy as error:
                return await answer_to(error).send(send)
        await self._app(scope, receive, send)


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

        async def timed_send(message: Message) -> None:
            nonlocal head
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
            await send(message)

        await self._app(scope, receive, timed_send)
