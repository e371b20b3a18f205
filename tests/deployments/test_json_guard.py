import json
import time

import pytest
from guarded import APP, check_error, split
from starlette.types import Message, Receive, Scope, Send
from test_openai_harness import client_of

from deployments.guards.json_guard import JsonGuard


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b'{"a": NaN}',
        b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
    ],
)
async def test_a_body_that_python_would_stumble_over_is_a_400(body: bytes) -> None:
    async with client_of(JsonGuard(APP)) as client:
        check_error(await client.post("/v1/python", content=body), 400, "invalid_json")


async def test_a_good_body_passes_as_it_is() -> None:
    body = '{"a": [1, 2.5e3, "ü\\n", null]}'.encode()
    async with client_of(JsonGuard(APP)) as client:
        for content in (body, split(body)):
            response = await client.post("/v1/completions", content=content)
            assert response.content == body


async def test_uploads_and_other_paths_are_none_of_the_guard_s_business() -> None:
    async with client_of(JsonGuard(APP)) as client:
        upload = {"content-type": "multipart/form-data; boundary=x"}
        response = await client.post("/v1/completions", content=b"--x", headers=upload)
        assert response.content == b"--x"
        assert (await client.get("/v1/models")).status_code == 200


async def test_a_client_that_leaves_before_its_body_s_end_gets_no_answer() -> None:
    async def leaves() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    await JsonGuard(APP)(scope, leaves, send)


async def test_the_application_still_hears_a_client_leave() -> None:
    heard: list[str] = []

    async def listens(scope: Scope, receive: Receive, send: Send) -> None:
        heard.extend([(await receive())["type"], (await receive())["type"]])

    messages: list[Message] = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": b"{}", "more_body": False},
    ]

    async def receive() -> Message:
        return messages.pop()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    await JsonGuard(listens)(scope, receive, _ignore)
    assert heard == ["http.request", "http.disconnect"]


def test_the_guard_costs_little() -> None:
    """0.6 us were measured; the bound is for slow machines and wrong orders of magnitude."""
    from pydantic_core import from_json

    body = json.dumps({"messages": [{"role": "user", "content": "hello " * 100}]}).encode()
    began_s = time.perf_counter()
    for _ in range(1000):
        from_json(body, allow_inf_nan=False, cache_strings="none")
    assert time.perf_counter() - began_s < 0.1


async def _ignore(message: Message) -> None:
    return None
