"""Refuses a single request inside vLLM's own front, with HTTP 507 wherever its answer has got to.

vLLM's OpenAI layer turns an error of its own classes into an answer or, in a stream, into an event
of status 200; which class and which `type` differs from version to version. So the text is the
mark: an error that begins with `POISON_SENTENCE` is written anew on its way out.
"""

import json
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import POISON_SENTENCE, BallastError
from deployments.openai.errors import ErrorAnswer
from deployments.openai.wire import event

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_STATUS = 507
_MARK = POISON_SENTENCE.encode()


async def refuse(llm: "AsyncLLM", request_id: str, error: BallastError) -> None:
    """End one request of vLLM's front; with `n > 1` all that belong to it."""
    state = llm.output_processor.request_states.get(request_id)
    if state is None:
        return  # its client left meanwhile
    assert state.queue is not None
    state.queue.put(_vllm_error(str(error)))
    await llm.abort(state.queue.request_id, internal=True)


def _vllm_error(text: str) -> Exception:
    """An error that `AsyncLLM.generate` lets through as it is."""
    try:
        from vllm.exceptions import GracefulHTTPError
    except ImportError:  # vLLM 0.26
        return ValueError(text)
    from http import HTTPStatus

    error: Exception = GracefulHTTPError(text, HTTPStatus(_STATUS))
    return error


class Verdicts:
    """Gives a refusal its status, if no byte was sent yet, and OpenAI's shape in any case."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        head: Message | None = None  # held until the first part of the body says what it is
        has_begun, is_over = False, False

        def judged_send(message: Message) -> Awaitable[None]:
            if has_begun and not is_over and _MARK not in message.get("body", b""):
                return send(message)  # every event of a stream comes by: no coroutine for it
            return judge(message)

        async def judge(message: Message) -> None:
            nonlocal head, has_begun, is_over
            if is_over:
                return
            if message["type"] == "http.response.start":
                head = message
                return
            refusal = _refusal(message)
            if refusal is not None:
                is_over = True
                if head is not None:
                    return await refusal.send(send)
                return await send({**message, "body": event(refusal.body), "more_body": False})
            if head is not None:
                start, head = head, None
                await send(start)
                has_begun = True
            await send(message)

        await self._app(scope, receive, judged_send)


def _refusal(message: Message) -> ErrorAnswer | None:
    """The refusal in a part of a body, which may be an event or the whole answer."""
    body: bytes = message.get("body", b"")
    if _MARK not in body:
        return None
    try:
        answer: Any = json.loads(body.removeprefix(b"data: "))
        text = answer["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return None  # a client's own text that says the same
    if not str(text).startswith(POISON_SENTENCE):
        return None
    return ErrorAnswer(status=_STATUS, message=str(text), code="request_ends_engine")
