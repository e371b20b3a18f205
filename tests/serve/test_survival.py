"""The engine dies under load; no client notices more than a pause."""

import os
import signal

import pytest
from load import Answer, stream_all
from server import Server

pytestmark = [pytest.mark.serve, pytest.mark.timeout(400)]

REQUESTS, AT_ONCE, TOKENS, AFTER_S = 200, 16, 64, 3.0
PAUSE_BESIDE_START_S = 5.0

# (model, part of the process's name): EngineCore, its worker, and the actor of transformers.
VICTIMS = [("demo", "EngineCore"), ("demo", "Worker"), ("demo-hf", "")]


async def undisturbed(server: Server, model: str) -> dict[int, str]:
    answers = await stream_all(server.url, model, requests=40, at_once=AT_ONCE)
    assert [answer.error for answer in answers] == [None] * 40
    return {answer.number: answer.text for answer in answers}


def assert_unharmed(answers: list[Answer], expected: dict[int, str]) -> None:
    assert [a for a in answers if a.error] == []
    assert [a.number for a in answers if a.text != expected[a.number % 40]] == []


@pytest.mark.parametrize(("model", "process"), VICTIMS)
async def test_streams_go_on_when_a_process_of_the_engine_is_killed(
    server: Server, model: str, process: str
) -> None:
    expected = await undisturbed(server, model)
    victim = server.engine_process(model, process)
    before = server.status(model)["attempt"]
    # Twice the rate that this machine may reach, so that the kill meets a load.
    answers = await stream_all(
        server.url,
        model,
        requests=REQUESTS,
        at_once=AT_ONCE,
        max_tokens=TOKENS,
        after_s=AFTER_S,
        disturb=lambda: os.kill(victim, signal.SIGKILL),
    )
    assert_unharmed(answers, expected)
    status = server.status(model)
    assert status["attempt"] == before + 1
    assert status["state"] == "ready"
    assert status["events"][-2]["cause"] is not None
    event = status["events"][-1]
    start_s = event["started_at"] - event["spawned_at"]
    assert max(a.longest_pause_s for a in answers) <= start_s + PAUSE_BESIDE_START_S


async def test_penalties_and_stop_strings_count_across_the_seam(server: Server) -> None:
    options = {"presence_penalty": 0.9, "frequency_penalty": 0.7, "min_tokens": 350, "stop": "va"}
    run = {"requests": 8, "at_once": 8, "max_tokens": 400, **options}
    expected = await stream_all(server.url, "demo", **run)
    victim = server.engine_process("demo", "EngineCore")
    answers = await stream_all(
        server.url,
        "demo",
        after_s=0.5,
        disturb=lambda: os.kill(victim, signal.SIGKILL),
        **run,
    )
    assert [a for a in answers if a.error] == []
    assert [a.text for a in answers] == [e.text for e in expected]
    assert server.status("demo")["requests"]["replayed"] > 0


async def test_guided_json_goes_on_inside_its_grammar(server: Server) -> None:
    import json

    import openai

    schema = {
        "type": "object",
        "properties": {"words": {"type": "array", "items": {"type": "string", "maxLength": 40},
                                 "minItems": 12, "maxItems": 12}},
        "required": ["words"],
        "additionalProperties": False,
    }  # fmt: skip
    victim = server.engine_process("demo", "EngineCore")
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        stream = await client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "words"}],
            temperature=0,
            max_tokens=1200,
            stream=True,
            response_format={"type": "json_schema", "json_schema": {"name": "w", "schema": schema}},
        )
        text, chunks = "", 0
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            chunks += 1
            if chunks == 20:
                os.kill(victim, signal.SIGKILL)
    assert len(json.loads(text)["words"]) == 12
