"""Where model calls take their turns; see `deployments.turns`.

For a model that computes on the cores that serve it. A GPU does not wait for long, and an event
loop that is full of its tokens comes round too seldom to let calls pass one by one: docs/log.md.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.guards.paths import is_model_call
from deployments.turns import LIMIT_S, Turns


class Turnstile:
    """Stands behind whatever may wait for long: the body's end, an engine that recovers."""

    def __init__(self, app: ASGIApp, *, limit_s: float = LIMIT_S) -> None:
        self._app = app
        self._turns = Turns(limit_s=limit_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_model_call(scope):
            return await self._app(scope, receive, send)
        with await self._turns.take():
            await self._app(scope, receive, send)
