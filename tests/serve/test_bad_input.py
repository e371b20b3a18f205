"""Rubbish and bad luck on the wire: a 4xx that names the field, and no slot is lost."""

import asyncio
import contextlib
import json
import socket
import time
from typing import Any

import httpx
import pytest
from server import Server

pytestmark = pytest.mark.serve

COMPLETION = {"prompt": "hi", "max_tokens": 4}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
JSON = {"Content-Type": "application/json"}
# Tens of seconds of work for the demo model: it can't be over before the client has left.
_LONG = {
    "prompt": "hi", "max_tokens": 2000, "n": 32, "temperature": 1, "stream": True,
    "ignore_eos": True,
}  # fmt: skip

# (what is changed in a good body, the field that the answer has to name)
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "word " * 5000}, "2048"),
    ({"prompt": [-5]}, "prompt"),
    ({"prompt": [10**9]}, "oken id"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 7}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 10**6}, "n"),
    ({"logprobs": 1000}, "logprobs"),
    ({"stop": 5}, "stop"),
    ({"seed": "x"}, "seed"),
]
CHAT_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": 7, "content": "x"}]}, "role"),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, "2048"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 10**9}, "tokens"),
]
BODIES = {
    "malformed": b'{"model": "%s", "prompt": ',
    "not UTF-8": b'{"model": "%s", "prompt": "\xff\xfe"}',
    "half a surrogate pair": b'{"model": "%s", "prompt": "\\ud800"}',
    "a hundred thousand brackets": b'{"model": "%s", "prompt":' + b"[" * 100_000,
    "not an object": b'"%s"',
    "nothing": b"",
}


@pytest.fixture(params=["common", "prefix"])
def url(request: pytest.FixtureRequest, server: Server, model: str) -> str:
    return server.url if request.param == "common" else f"{server.url}/{model}"


def post(url: str, path: str, body: dict[str, Any] | bytes, **options: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(url + path, content=content, headers=JSON, timeout=60, **options)


def assert_refused(answer: httpx.Response, status: int, names: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert names in answer.text


@pytest.fixture(autouse=True)
def _no_slot_is_lost(server: Server, model: str) -> Any:
    yield
    assert_free(server, model)


def assert_free(server: Server, model: str, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while (held := server.status(model)["requests"]["in_flight"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert held == 0


def test_each_wrong_field_is_named(url: str, model: str) -> None:
    for change, names in FIELDS:
        answer = post(url, "/v1/completions", {"model": model, **COMPLETION, **change})
        assert_refused(answer, 400, names)
    for change, names in CHAT_FIELDS:
        answer = post(url, "/v1/chat/completions", {"model": model, **CHAT, **change})
        assert_refused(answer, 400, names)


@pytest.mark.parametrize("kind", list(BODIES))
def test_a_body_that_is_no_request_is_refused(url: str, model: str, kind: str) -> None:
    body = BODIES[kind].replace(b"%s", model.encode())
    assert_refused(post(url, "/v1/completions", body), 400, "")
    assert_refused(post(url, "/v1/chat/completions", body), 400, "")


def test_an_unknown_model_is_not_found(url: str) -> None:
    body = {"model": "nope", **COMPLETION}
    assert_refused(post(url, "/v1/completions", body), 404, "nope")
    body = {"modelId": "nope", "prompt": "hi"}
    assert_refused(post(url, "/api/v1/inference/stream", body), 404, "nope")


def test_fifty_megabytes_are_refused_however_they_are_sent(url: str, model: str) -> None:
    body = b'{"model": "%s", "prompt": "%s"}' % (model.encode(), b"a" * 50_000_000)
    assert_refused(post(url, "/v1/completions", body), 413, "max_body_bytes")

    def chunks() -> Any:
        for start in range(0, len(body), 1_000_000):
            yield body[start : start + 1_000_000]

    answer = httpx.post(f"{url}/v1/completions", content=chunks(), headers=JSON, timeout=60)
    assert_refused(answer, 413, "max_body_bytes")


def test_a_body_longer_than_haproxy_s_buffer_finds_its_model(url: str, model: str) -> None:
    """The model's name comes after 200 kB: the gateway has to find it."""
    body = {"prompt": [5] * 100_000, "max_tokens": 4, "model": model}
    assert_refused(post(url, "/v1/completions", body), 400, "2048")


async def test_a_client_that_leaves_in_mid_stream_frees_its_request(
    server: Server, url: str, model: str
) -> None:
    body = {"model": model, **_LONG}
    async with (
        httpx.AsyncClient(timeout=60) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as answer,
    ):
        lines = answer.aiter_lines()
        await anext(lines)
        assert server.status(model)["requests"]["in_flight"] >= 1
        await lines.aclose()
    assert_free(server, model, within_s=5.0)


def test_a_killed_client_frees_its_request(server: Server, url: str, model: str) -> None:
    """No goodbye at all: the connection is reset, as when the client's process is killed."""
    _, _, rest = url.partition("//")
    host, _, prefix = rest.partition("/")
    name, port = host.split(":")
    body = {"model": model, **_LONG}
    content = json.dumps(body).encode()
    path = f"/{prefix}/v1/completions" if prefix else "/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((name, int(port))) as client:
        client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        assert b"200" in client.recv(4096)
        # Linger 0: close() sends a reset.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert_free(server, model, within_s=5.0)


async def test_a_stream_read_at_a_byte_a_second_holds_nobody_up(
    server: Server, url: str, model: str
) -> None:
    body = {"model": model, **_LONG}
    content = json.dumps(body).encode()
    _, _, rest = url.partition("//")
    host, _, prefix = rest.partition("/")
    name, port = host.split(":")
    path = f"/{prefix}/v1/completions" if prefix else "/v1/completions"
    reader, writer = await asyncio.open_connection(name, int(port), limit=64)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    await writer.drain()
    for _ in range(3):
        await reader.read(1)
        await asyncio.sleep(1)
    started = time.monotonic()
    other = await asyncio.to_thread(post, url, "/v1/completions", {"model": model, **COMPLETION})
    assert other.status_code == 200
    assert time.monotonic() - started < 10
    writer.transport.abort()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
