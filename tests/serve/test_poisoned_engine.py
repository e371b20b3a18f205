"""A request that ends every engine, on real ones: it is refused, and nobody else notices more."""

import asyncio
import json

import httpx
import pytest
from load import stream_all
from server import POISON, Server
from test_survival import assert_unharmed, undisturbed

MOST_LIVES = 6  # four deaths with it; a load or two may fail on the way down
pytestmark = [pytest.mark.serve, pytest.mark.timeout(500)]


async def ask(server: Server, model: str, *, stream: bool) -> httpx.Response:
    body = {"model": model, "prompt": f"{POISON} now", "max_tokens": 64, "stream": stream}
    async with httpx.AsyncClient(timeout=400) as client:
        return await client.post(f"{server.url}/v1/completions", json=body)


async def test_a_request_that_ends_every_engine_is_a_507_and_the_others_live_on(
    server: Server, model: str
) -> None:
    expected = await undisturbed(server, model)
    before = server.status(model)
    answers, refused = await asyncio.gather(
        stream_all(server.url, model, requests=60, at_once=8, max_tokens=64),
        ask(server, model, stream=model == "demo"),
    )
    assert_unharmed(answers, expected)
    assert refused.status_code == 507, refused.text
    error = json.loads(refused.text)["error"]
    assert error["type"] == "insufficient_memory_error"
    assert error["code"] == "request_ends_engine"
    status = server.status(model)
    assert status["state"] == "ready"
    assert 2 <= status["attempt"] - before["attempt"] <= MOST_LIVES, status["events"]
    assert status["settings"] == before["settings"]
    assert status["requests"]["in_flight"] == 0
