"""Errors as OpenAI's clients expect them. Knows the wire shape, not what went wrong where."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.types import Send

from deployments.errors import GONE_RETRY_AFTER_S, Busy, Fatal, Invalid, Poison
from deployments.openai.wire import send_json

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    500: "server_error",
    503: "server_error",
    507: "insufficient_memory_error",  # a request that ends the engine
}


class RequestError(Invalid):
    """The request can't be served as it is; `param` is the field to change."""

    def __init__(
        self, problem: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(problem, param or "")
        self.args = (problem, param, code, status)
        self.param = param
        self.code = code
        self.status = status


class UnknownModel(RequestError):
    """No model of this name is served here."""

    def __init__(self, asked: str, served: str) -> None:
        super().__init__(
            f"The model {asked!r} does not exist; this server has {served!r}.",
            "model",
            "model_not_found",
            404,
        )
        self.args = (asked, served)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorAnswer:
    """An HTTP answer that says what went wrong."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        error = {
            "message": self.message,
            "type": TYPES.get(self.status, "server_error"),
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}, ensure_ascii=False).encode(errors="replace")

    async def send(self, send: Send) -> None:
        """As a whole ASGI response."""
        await send_json(send, self.body, status=self.status, headers=self.headers)


def answer_to(error: Exception) -> ErrorAnswer:
    """What a client hears of an error; of a bug of ours it hears no details."""
    match error:
        case RequestError():
            return ErrorAnswer(
                status=error.status, message=str(error), param=error.param, code=error.code
            )
        case Invalid():
            return ErrorAnswer(status=400, message=str(error), param=error.setting or None)
        case Busy():
            return ErrorAnswer(
                status=503,
                message=str(error),
                code="engine_busy",
                headers={"retry-after": str(error.retry_after_s)},
            )
        case Poison():
            return ErrorAnswer(status=507, message=str(error), code="request_ends_engine")
        case Fatal():
            return ErrorAnswer(
                status=503,
                message=str(error),
                code="engine_failed",
                headers={"retry-after": str(GONE_RETRY_AFTER_S)},
            )
        case _:
            return ErrorAnswer(
                status=500, message="The server made a mistake.", code="internal_error"
            )
