"""The guard that waits, the one that tells the time, and all of them together."""

from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import pytest
from guarded import APP, check_error, split
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from test_openai_harness import client_of, listening

from deployments.errors import Busy
from deployments.guards.admission import Admission
from deployments.guards.api_keys import ApiKeys, KeySet
from deployments.guards.body_limit import BodyLimit
from deployments.guards.json_guard import JsonGuard
from deployments.guards.response_time import ResponseTime


async def _free() -> None:
    return None


async def _busy() -> None:
    raise Busy("the engine of demo is restarting", retry_after_s=7)


@pytest.mark.parametrize(
    ("admission", "status"), [(_free, 200), (_busy, 503)], ids=["free", "busy"]
)
async def test_a_model_call_needs_admission(
    admission: Callable[[], Awaitable[None]], status: int
) -> None:
    async with client_of(Admission(APP, admission)) as client:
        response = await client.post("/v1/completions", content=b"{}")
        assert response.status_code == status
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/health")).status_code == 200


async def test_a_busy_engine_says_when_to_come_again() -> None:
    async with client_of(Admission(APP, _busy)) as client:
        response = await client.post("/v1/completions", content=b"{}")
        check_error(response, 503, "engine_busy")
        assert response.headers["retry-after"] == "7"


# The time of a response


async def test_the_response_time_is_that_of_the_first_byte_of_the_body() -> None:
    times_s = iter([1.0, 1.0123])

    async def first_then_more() -> AsyncIterator[bytes]:
        yield b"first"
        yield b"more"

    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(first_then_more())

    app = ResponseTime(Starlette(routes=[Route("/", stream)]), clock=lambda: next(times_s))
    async with client_of(app) as client:
        response = await client.get("/")
        assert response.headers["x-response-time"] == "12.3ms"
        assert response.text == "firstmore"


async def test_errors_have_a_response_time_too() -> None:
    async with client_of(ResponseTime(BodyLimit(APP, max_body_bytes=1))) as client:
        response = await client.post("/v1/completions", content=b"{}")
        assert response.status_code == 413
        assert response.headers["x-response-time"].endswith("ms")


async def test_all_of_them_together_pass_a_call_through() -> None:
    guarded = JsonGuard(Admission(APP, _free))
    app = ResponseTime(BodyLimit(ApiKeys(guarded, KeySet.of(["first-key"])), max_body_bytes=100))
    async with (
        listening(app) as url,
        httpx.AsyncClient(base_url=url, headers={"x-api-key": "first-key"}) as client,
    ):
        response = await client.post("/v1/completions", content=split(b'{"a": 1}'))
        assert response.content == b'{"a": 1}'
        too_large = await client.post("/v1/completions", content=split(b" " * 200))
        check_error(too_large, 413, "body_too_large")
