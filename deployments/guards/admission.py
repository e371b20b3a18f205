"""When a call comes in. Knows no engine: whom it waits for is given to it."""

from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.errors import Busy
from deployments.guards.paths import is_model_call
from deployments.openai.errors import answer_to


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
