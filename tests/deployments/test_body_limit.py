import asyncio

import httpx
import pytest
from guarded import APP, check_error, chunks_of
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send
from test_openai_harness import client_of, listening

from deployments.guards.body_limit import BodyLimit


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
