"""A replica's own pages beside the model's API: health, status, metrics."""

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.guards.paths import route_path

Page = Callable[[Request], Awaitable[Response]]


class Pages:
    """Answers GET at these paths; everything else goes to the application behind.

    One lookup in a dictionary: a Starlette around vLLM's own would put its error handlers and its
    router, of which vLLM has the same once more, between each token and its client.
    """

    def __init__(self, app: ASGIApp, pages: Mapping[str, Page]) -> None:
        self._app = app
        self._pages = dict(pages)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        page = self._pages.get(route_path(scope)) if scope["type"] == "http" else None
        if page is None:
            await self._app(scope, receive, send)
        elif scope["method"] not in ("GET", "HEAD"):
            refusal = PlainTextResponse("Method Not Allowed", 405, headers={"allow": "GET, HEAD"})
            await refusal(scope, receive, send)
        else:
            response = await page(Request(scope, receive))
            await response(scope, receive, send)
