"""POST /api/v1/inference/stream, the endpoint of the CY-LLM engines, over any OpenAI application.

It answers with the server-sent events of /v1/completions as they are.
"""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.guards.paths import route_path
from deployments.openai.errors import ErrorAnswer, RequestError, UnknownModel, answer_to
from deployments.openai.requests import parse
from deployments.openai.wire import read_body, replay_body, send_json

PATH = "/api/v1/inference/stream"
_COMPLETIONS = "/v1/completions"
# What OpenAI applications, vLLM's among them, call the fields of this endpoint in their errors.
_FIELD_NAMES = {
    "model": "modelId",
    "body.prompt": "prompt",
    "input_text": "prompt",
    "input_tokens": "prompt",
}


class InferenceRequest(BaseModel):
    """Numbers are checked where they are used: the OpenAI application names the same fields."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    model_id: str = Field(alias="modelId")
    prompt: str = Field(min_length=1)
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: Any = None
    seed: int | None = None
    ignore_eos: bool | None = None


class InferenceStream:
    """Rewrites a call of this endpoint into a streamed completion of the application below."""

    def __init__(self, app: ASGIApp, *, model: str) -> None:
        self._app = app
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_path(scope) != PATH:
            await self._app(scope, receive, send)
        elif scope["method"] != "POST":
            message = f"{PATH} takes POST only."
            await ErrorAnswer(status=405, message=message, headers={"allow": "POST"}).send(send)
        else:
            await self._stream(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(receive)
        if body is None:
            return
        try:
            asked = parse(InferenceRequest, body)
            if asked.model_id != self._model:
                unknown = UnknownModel(asked.model_id, self._model)
                raise RequestError(str(unknown), "modelId", unknown.code, unknown.status)
        except RequestError as error:
            return await answer_to(error).send(send)
        completion = _completion(asked)
        inner = _rewritten(scope, len(completion))
        await self._app(inner, replay_body(completion, receive), _renaming(send))


def _completion(asked: InferenceRequest) -> bytes:
    settings = asked.model_dump(exclude={"model_id"}, exclude_none=True)
    return json.dumps({**settings, "model": asked.model_id, "stream": True}).encode()


def _rewritten(scope: Scope, num_bytes: int) -> Scope:
    path = scope["path"].removesuffix(PATH) + _COMPLETIONS
    inner = {**scope, "path": path, "raw_path": path.encode(), "headers": [*scope["headers"]]}
    headers = MutableHeaders(scope=inner)
    headers["content-length"] = str(num_bytes)
    headers["content-type"] = "application/json"
    del headers["transfer-encoding"]
    return inner


def _renaming(send: Send) -> Send:
    """Passes a stream through; an error is collected, to give its field the name it has here."""
    failed: Message | None = None
    body = b""

    async def renaming_send(message: Message) -> None:
        nonlocal failed, body
        if message["type"] == "http.response.start" and message["status"] >= 400:
            failed = message
        elif failed is None:
            await send(message)
        elif message["type"] == "http.response.body":
            body += message.get("body", b"")
            if not message.get("more_body", False):
                kept = {
                    name.decode(): value.decode()
                    for name, value in failed["headers"]
                    if name.lower() not in (b"content-length", b"content-type")
                }
                await send_json(send, _renamed(body), status=failed["status"], headers=kept)

    return renaming_send


def _renamed(body: bytes) -> bytes:
    try:
        answer = json.loads(body)
    except ValueError:
        return body
    match answer:
        case {"error": {"param": str(param)}} if param in _FIELD_NAMES:
            answer["error"]["param"] = _FIELD_NAMES[param]
            return json.dumps(answer).encode()
    return body
