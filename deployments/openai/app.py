"""OpenAI's endpoints for one model on an engine that speaks in tokens.

The engine `vllm` does not come here, it has vLLM's own layer; what is answered here has its shape.
"""

import time
from collections.abc import Callable
from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from openai.types import Model
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deployments.errors import BallastError
from deployments.openai.errors import ErrorAnswer, RequestError, UnknownModel, answer_to
from deployments.openai.presence import WhileClientStays
from deployments.openai.requests import ChatRequest, CompletionRequest, parse
from deployments.openai.responder import Gate, Responder
from deployments.openai.tokenizers import Tokenizer
from deployments.streams import Streams


def build_openai_app(
    model: str,
    streams: Streams,
    keeper: Gate,
    tokenizer: Tokenizer,
    max_model_len: Callable[[], int],
    *,
    wait_s: float,
    max_waiting: int,
    clock: Callable[[], float] = time.time,
) -> FastAPI:
    """`max_model_len` is asked at each request: a step down the ladder may change it.

    `wait_s` and `max_waiting` bound the wait for an engine that is restarting.
    """
    app = FastAPI(title="Ballast", openapi_url=None)
    responder = Responder(
        model,
        streams,
        keeper,
        tokenizer,
        max_model_len,
        wait_s=wait_s,
        max_waiting=max_waiting,
        clock=clock,
    )
    created_s = int(clock())

    def card() -> dict[str, object]:
        known = Model(id=model, object="model", created=created_s, owned_by="ballast")
        return {**known.model_dump(exclude_unset=True), "max_model_len": max_model_len()}

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [card()]})

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> JSONResponse:
        if model_id != model:
            raise UnknownModel(model_id, model)
        return JSONResponse(card())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await request.body())
        return WhileClientStays(partial(responder.complete, asked))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = parse(ChatRequest, await request.body())
        return WhileClientStays(partial(responder.chat, asked))

    for kind in (BallastError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer_error)
    return app


async def _answer_error(_: Request, error: Exception) -> Response:
    match error:
        case HTTPException():
            answer = ErrorAnswer(
                status=error.status_code, message=error.detail, headers=error.headers or {}
            )
        case ClientDisconnect():  # nobody hears this
            answer = answer_to(RequestError("The client left before its request was complete."))
        case _:
            answer = answer_to(error)
    return Response(
        answer.body, answer.status, {**answer.headers, "content-type": "application/json"}
    )
