import httpx
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from deployments.pages import Pages


async def behind(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("behind")(scope, receive, send)


async def health(request: Request) -> Response:
    return PlainTextResponse("fine")


def client(root_path: str = "") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(Pages(behind, {"/health": health}), root_path=root_path)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def test_a_page_answers_also_below_a_prefix() -> None:
    assert (await client().get("/health")).text == "fine"
    assert (await client("/demo").get("/demo/health")).text == "fine"


async def test_everything_else_goes_to_the_application_behind() -> None:
    assert (await client().post("/v1/completions")).text == "behind"


async def test_a_page_only_answers_reading() -> None:
    answer = await client().post("/health")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD"
