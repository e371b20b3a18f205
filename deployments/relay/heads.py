"""The heads of requests and answers as they travel between relay and replica."""

from typing import Self

from pydantic import BaseModel, ConfigDict
from starlette.types import Message, Scope

from deployments.guards.paths import route_path

Headers = tuple[tuple[str, str], ...]


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def encoded(self) -> bytes:
        return self.model_dump_json().encode()

    @classmethod
    def decoded(cls, payload: bytes) -> Self:
        return cls.model_validate_json(payload)


class RequestHead(_Wire):
    """A request below the model's prefix."""

    method: str
    path: str
    query: str
    headers: Headers
    client: tuple[str, int] | None

    @classmethod
    def of(cls, scope: Scope, *, request_id: str) -> Self:
        """`request_id` names it in both replicas, where its client has not named it."""
        headers = _text(scope["headers"])
        if not any(name == "x-request-id" for name, _ in headers):
            headers = (*headers, ("x-request-id", request_id))
        client = scope.get("client")
        return cls(
            method=scope["method"],
            path=route_path(scope),
            query=scope.get("query_string", b"").decode("latin-1"),
            headers=headers,
            client=(client[0], client[1]) if client else None,
        )

    def scope(self) -> Scope:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query.encode("latin-1"),
            "headers": _raw(self.headers),
            "client": self.client,
            "server": None,
            "state": {},
        }


class ResponseHead(_Wire):
    status: int
    headers: Headers

    @classmethod
    def of(cls, message: Message) -> Self:
        return cls(status=message["status"], headers=_text(message.get("headers", ())))

    @property
    def is_event_stream(self) -> bool:
        return self.value("content-type").startswith("text/event-stream")

    def message(self, **more: str) -> Message:
        kept = (header for header in self.headers if header[0].lower() not in more)
        headers = (*kept, *more.items())
        return {"type": "http.response.start", "status": self.status, "headers": _raw(headers)}

    def value(self, wanted: str) -> str:
        """Of a header by its lower-case name; empty if there is none."""
        return next((value for name, value in self.headers if name.lower() == wanted), "")


def _text(headers: list[tuple[bytes, bytes]] | tuple[()]) -> Headers:
    return tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in headers)


def _raw(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
