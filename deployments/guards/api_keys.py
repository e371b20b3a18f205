"""Who may come in: the keys, kept as digests, and the guard that asks for one."""

import hashlib
import hmac
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.errors import Invalid
from deployments.guards.paths import route_path
from deployments.openai.errors import ErrorAnswer

API_KEYS_VARIABLE = "BALLAST_API_KEYS"
OPEN_PATHS = frozenset({"/health", "/metrics"})
_DIGEST_PREFIX = "sha256:"
_UNKNOWN_KEY = ErrorAnswer(
    status=401,
    message="No known API key in the header Authorization: Bearer or X-API-Key.",
    code="invalid_api_key",
    headers={"www-authenticate": "Bearer"},
)


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
