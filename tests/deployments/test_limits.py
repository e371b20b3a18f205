import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send
from test_openai_harness import client_of, listening

from deployments.errors import Busy, Invalid
from deployments.limits import (
    Admission,
    ApiKeys,
    BodyLimit,
    JsonGuard,
    KeySet,
    ResponseTime,
    load_api_keys,
)

KEYS = KeySet.of(["first-key", "second-key"])


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(await request.body())


async def python_json(request: Request) -> JSONResponse:
    """As an application that reads its body with Python's json."""
    return JSONResponse(json.loads(await request.body()))


async def page(request: Request) -> PlainTextResponse:
    return PlainTextResponse("page")


APP = Starlette(
    routes=[
        Route("/v1/completions", echo, methods=["POST"]),
        Route("/v1/python", python_json, methods=["POST"]),
        Route("/v1/models", page),
        Route("/health", page),
        Route("/status", page),
    ]
)


async def chunks_of(size: int, number: int) -> AsyncIterator[bytes]:
    for _ in range(number):
        yield b"x" * size


def check_error(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


# The size of a body


async def test_a_body_up_to_the_limit_passes() -> None:
    async with client_of(BodyLimit(APP, max_body_bytes=100)) as client:
        for content in (b"x" * 100, chunks_of(10, 10)):
            response = await client.post("/v1/completions", content=content)
            assert (response.status_code, len(response.content)) == (200, 100)


async def test_a_body_over_the_limit_is_a_413_with_or_without_its_length() -> None:
    async with client_of(BodyLimit(APP, max_body_bytes=100)) as client:
        for content in (b"x" * 101, chunks_of(10, 11)):
            response = await client.post("/v1/completions", content=content)
            check_error(response, 413, "body_too_large")
            assert "limits.max_body_bytes" in response.text
            assert response.headers["connection"] == "close"


async def test_a_body_over_the_limit_is_a_413_under_an_application_that_hides_errors() -> None:
    async def hides(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await APP(scope, receive, send)
        except Exception:
            await PlainTextResponse("could not read the body", 400)(scope, receive, send)

    async with client_of(BodyLimit(hides, max_body_bytes=100)) as client:
        response = await client.post("/v1/completions", content=chunks_of(10, 11))
        check_error(response, 413, "body_too_large")


@pytest.mark.parametrize("framing", ["content-length: 50000000", "transfer-encoding: chunked"])
async def test_the_answer_does_not_wait_for_the_rest_of_a_large_body(framing: str) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{framing}\r\n\r\n"
    async with listening(BodyLimit(APP, max_body_bytes=100)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(head.encode() + b"c8\r\n" + b"x" * 200 + b"\r\n")
        async with asyncio.timeout(1):
            assert b" 413 " in await reader.readuntil(b"\r\n\r\n")
        writer.close()


@pytest.mark.parametrize("in_chunks", [False, True])
async def test_a_client_that_sends_all_of_its_50_mb_gets_the_answer(in_chunks: bool) -> None:
    content = chunks_of(1_000_000, 50) if in_chunks else b"x" * 50_000_000
    async with listening(BodyLimit(APP)) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post("/v1/completions", content=content)
        check_error(response, 413, "body_too_large")


@pytest.mark.parametrize(("linger_bytes", "linger_s"), [(10_000, 60.0), (2**40, 0.01)])
async def test_an_endless_body_is_cut_off(linger_bytes: int, linger_s: float) -> None:
    num_received = 0

    async def endless() -> Message:
        nonlocal num_received
        num_received += 100
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": b"x" * 100, "more_body": True}

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    limit = BodyLimit(APP, max_body_bytes=99, linger_bytes=linger_bytes, linger_s=linger_s)
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    async with asyncio.timeout(5):
        await limit(scope, endless, send)
    assert num_received <= 10_200
    assert sent[0]["status"] == 413
    assert [message.get("more_body", False) for message in sent[1:]] == [True, False]


async def test_a_body_that_waits_for_100_continue_is_not_asked_for() -> None:
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n"
    async with listening(BodyLimit(APP)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(f"{head}content-length: 50000000\r\n\r\n".encode())
        async with asyncio.timeout(1):
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 413 ")
        writer.close()


async def test_an_absurd_content_length_is_a_413() -> None:
    async with client_of(BodyLimit(APP)) as client:
        headers = {"content-length": "9" * 5000}
        response = await client.post("/v1/completions", content=b"x", headers=headers)
        check_error(response, 413, "body_too_large")


# API keys


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer second-key"},
        {"x-api-key": "second-key"},
        {"x-api-key": "first-key", "authorization": "Bearer placeholder"},
    ],
)
async def test_a_known_key_opens_the_door(headers: dict[str, str]) -> None:
    async with client_of(ApiKeys(APP, KEYS)) as client:
        response = await client.get("/v1/models", headers=headers)
        assert response.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer other"},
        {"authorization": "Basic first-key"},
        {"authorization": "first-key"},
        {"authorization": "Bearer"},
        {"x-api-key": "first-ke"},
        {"x-api-key": ""},
        {"x-api-key": "first-key second-key"},
        {"x-api-key": b"\xff\xfe"},
        {"x-api-key": "sha256:" + hashlib.sha256(b"first-key").hexdigest()},
    ],
)
async def test_any_other_key_is_a_401(headers: dict[str, Any]) -> None:
    async with client_of(ApiKeys(APP, KEYS)) as client:
        for path in ("/v1/models", "/status"):
            check_error(await client.get(path, headers=headers), 401, "invalid_api_key")


async def test_health_and_metrics_are_open_unless_configured_otherwise() -> None:
    async with client_of(ApiKeys(APP, KEYS)) as client:
        assert (await client.get("/health")).status_code == 200
    async with client_of(ApiKeys(APP, KEYS, open_paths=("/status",))) as client:
        assert (await client.get("/status")).status_code == 200
        assert (await client.get("/health")).status_code == 401


async def test_an_open_path_is_open_below_a_prefix_and_nowhere_else() -> None:
    mounted = Starlette(routes=[Mount("/demo", ApiKeys(APP, KEYS))])
    async with client_of(mounted) as client:
        assert (await client.get("/demo/health")).status_code == 200
        assert (await client.get("/demo/v1/health")).status_code == 401


async def test_without_keys_the_door_is_open() -> None:
    async with client_of(ApiKeys(APP, KeySet())) as client:
        assert (await client.get("/v1/models")).status_code == 200


async def test_a_websocket_needs_a_key_too() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    await ApiKeys(APP, KEYS)(scope, _nothing, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(known: bytes, given: bytes) -> bool:
        compared.append(known)
        return known == given

    monkeypatch.setattr("deployments.limits.hmac.compare_digest", compare)
    for key in (b"first-key", b"second-key", b"none"):
        compared.clear()
        KEYS.accepts(key)
        assert compared == list(KEYS.digests)


def test_keys_come_from_a_file_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    digest = hashlib.sha256(b"third").hexdigest()
    file.write_text(f"# ours\nfirst\n\n  second  \nsha256:{digest}\nключ\n")
    keys = load_api_keys(file, {"BALLAST_API_KEYS": "ignored"})
    assert len(keys) == 4
    assert all(keys.accepts(key.encode()) for key in ("first", "second", "third", "ключ"))
    assert not any(map(keys.accepts, (b"", b"# ours", b"ignored")))


def test_keys_come_from_the_environment_without_a_file() -> None:
    keys = load_api_keys(None, {"BALLAST_API_KEYS": "first\nsecond"})
    assert (len(keys), keys.accepts(b"second")) == (2, True)
    assert not load_api_keys(None, {})


@pytest.mark.parametrize("content", [None, b"", b"# none\n", b"\xff\xfe", b"sha256:12\n"])
def test_a_file_without_a_key_does_not_open_the_door(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(Invalid):
        load_api_keys(file, {"BALLAST_API_KEYS": "first"})


async def test_no_key_is_in_a_log_or_a_repr(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with client_of(ApiKeys(APP, KEYS)) as client:
        await client.get("/v1/models", headers={"x-api-key": "wrong-key"})
    digests = [digest.hex() for digest in KEYS.digests]
    text = repr(KEYS) + repr(vars(ApiKeys(APP, KEYS))) + caplog.text
    assert not any(secret in text for secret in ("first-key", "wrong-key", *digests))
    assert not any(repr(digest)[2:-1] in text for digest in KEYS.digests)


# Well-formed JSON


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
        for content in (body, _split(body)):
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


# The wait for the engine


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
    app = ResponseTime(BodyLimit(ApiKeys(guarded, KEYS), max_body_bytes=100))
    async with (
        listening(app) as url,
        httpx.AsyncClient(base_url=url, headers={"x-api-key": "first-key"}) as client,
    ):
        response = await client.post("/v1/completions", content=_split(b'{"a": 1}'))
        assert response.content == b'{"a": 1}'
        too_large = await client.post("/v1/completions", content=_split(b" " * 200))
        check_error(too_large, 413, "body_too_large")


async def _split(body: bytes) -> AsyncIterator[bytes]:
    for at in range(len(body)):
        yield body[at : at + 1]


async def _nothing() -> Message:
    raise AssertionError("nothing to receive")


async def _ignore(message: Message) -> None:
    return None
