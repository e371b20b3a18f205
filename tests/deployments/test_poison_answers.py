"""What the client of a refused request sees: 507, or an event in OpenAI's shape."""

import asyncio
import json

import httpx
import openai
import pytest
from samples import OUT_OF_MEMORY
from starlette.types import ASGIApp, Receive, Scope, Send
from test_openai_harness import Ladder, answer_of, client_of, listening, serving, texts_of, until

from deployments.engines.fake import FakeEngine, Script
from deployments.engines.vllm_verdicts import Verdicts
from deployments.errors import Poison

TEXT = str(Poison("m", "cmpl-1", 2, "device_memory"))
# As vLLM 0.29 writes it; other versions have another `type` and `code`.
VLLM_ERROR = json.dumps(
    {"error": {"message": TEXT, "type": "Insufficient Storage", "param": None, "code": 507}}
)
SLOW = Script(step_s=0.01)


async def die_twice_of(engine: FakeEngine, num_tokens: int) -> None:
    """Of memory, with one request in the batch, once it has this many tokens."""
    for _ in range(2):
        await until(lambda: any(len(s.output) >= num_tokens for s in engine._running.values()))
        engine.die(OUT_OF_MEMORY)


@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_byte_it_is_a_507(ladder: Ladder, stream: bool) -> None:
    async with serving(ladder, SLOW) as served, served.client() as client:
        asked = {"prompt": "hello", "max_tokens": 2000, "stream": stream}
        call = asyncio.create_task(client.post("/v1/completions", json=asked))
        await die_twice_of(served.engine, 0)
        response = await call
        assert response.status_code == 507
        error = response.json()["error"]
        assert error["type"] == "insufficient_memory_error"
        assert error["code"] == "request_ends_engine"
        assert "2 engines of fake died" in error["message"]
        assert served.is_idle


async def test_in_the_middle_of_a_stream_it_is_an_event_and_the_client_raises(
    ladder: Ladder,
) -> None:
    async with (
        serving(ladder, SLOW) as served,
        listening(served.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        death = asyncio.create_task(die_twice_of(served.engine, 3))
        stream = await client.completions.create(
            model="fake", prompt="hello", max_tokens=2000, stream=True
        )
        text = ""

        async def read() -> None:
            nonlocal text
            async for chunk in stream:
                text += chunk.choices[0].text

        with pytest.raises(openai.APIError, match="ends the engine"):
            await read()
        await death
        assert len(text) >= 3
        assert answer_of("hello", 2000).startswith(text)


def vllm_app(*parts: str, content_type: str = "text/event-stream", status: int = 200) -> ASGIApp:
    """Sends these parts of a body, as vLLM's layer would."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", content_type.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return Verdicts(app)


def chunk(text: str) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'text': text}]})}\n\n"


async def answer(app: ASGIApp) -> httpx.Response:
    async with client_of(app) as client:
        return await client.get("/")


async def test_vllms_first_event_becomes_the_status_that_it_is() -> None:
    response = await answer(vllm_app(f"data: {VLLM_ERROR}\n\n", "data: [DONE]\n\n"))
    assert response.status_code == 507
    assert response.json()["error"] == {
        "message": TEXT,
        "type": "insufficient_memory_error",
        "param": None,
        "code": "request_ends_engine",
    }


@pytest.mark.parametrize("status", [400, 507])
async def test_vllms_whole_answer_has_the_status_and_shape_of_ours(status: int) -> None:
    app = vllm_app(VLLM_ERROR, content_type="application/json", status=status)
    response = await answer(app)
    assert response.status_code == 507
    assert response.json()["error"]["code"] == "request_ends_engine"


async def test_vllms_later_event_has_the_shape_of_ours_and_is_the_last() -> None:
    parts = (chunk("hel"), chunk("lo"), f"data: {VLLM_ERROR}\n\n", "data: [DONE]\n\n")
    response = await answer(vllm_app(*parts))
    assert response.status_code == 200
    *events, last = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-1]]
    assert texts_of(events) == {0: "hello"}
    assert last["error"]["code"] == "request_ends_engine"


async def test_a_model_that_speaks_of_a_refusal_is_not_refused() -> None:
    other = json.dumps({"error": {"message": "another", "code": 400}})
    parts = (chunk(TEXT), chunk(f'{{"error": "{TEXT}"}}'), f"data: {other}\n\n", "data: [DONE]\n\n")
    response = await answer(vllm_app(*parts))
    assert response.status_code == 200
    assert response.text == "".join(parts)
