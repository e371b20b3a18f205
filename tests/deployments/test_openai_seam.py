"""The engine dies at any token, several times, and the answer is the same to its last byte."""

import asyncio
import re
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_openai_harness import Ladder, client_of, serving
from test_relay import heard
from test_saying_engine import Saying, SayingEngine

from deployments.guards.response_time import ResponseTime
from deployments.replays import REPLAYED_HEADER

CHARACTERS = "abc stop.\n äß€ 😀👩‍👩‍👧你क्षि\u0301\ufffd"
TEXTS = st.text(st.sampled_from(CHARACTERS), min_size=1, max_size=80)


@st.composite
def sayings(draw: st.DrawFn) -> tuple[Saying, dict[str, Any]]:
    """A text, a request whose stop strings are likely to be in it, and deaths while it is said."""
    text = draw(TEXTS)
    num_tokens = len(text.encode())
    parts = st.integers(0, len(text) - 1).flatmap(
        lambda at: st.integers(1, 6).map(lambda length: text[at : at + length])
    )
    body: dict[str, Any] = {
        "model": "fake",
        "stream": draw(st.booleans()),
        "n": draw(st.integers(1, 3)),
        "max_tokens": draw(st.integers(1, num_tokens + 5)),
        "stop": draw(st.lists(parts | TEXTS.map(lambda other: other[:4]), max_size=4)),
    }
    body["min_tokens"] = draw(st.integers(0, body["max_tokens"]))
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    deaths = tuple(draw(st.lists(st.integers(0, num_tokens), max_size=4)))
    return Saying(text, draw(st.integers(1, 5)), deaths), body


@st.composite
def apis(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    has_logprobs = draw(st.booleans())
    if draw(st.booleans()):
        logprobs = {"logprobs": True, "top_logprobs": 1} if has_logprobs else {}
        message = {"role": "user", "content": "hi"}
        return "/v1/chat/completions", {"messages": [message], **logprobs}
    extras: dict[str, Any] = {"logprobs": 1} if has_logprobs else {"echo": draw(st.booleans())}
    return "/v1/completions", {"prompt": draw(st.sampled_from(["hi", ["hi", "ho"]])), **extras}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(saying=sayings(), api=apis())
def test_an_answer_does_not_show_where_its_engine_died(
    ladder: Ladder, saying: tuple[Saying, dict[str, Any]], api: tuple[str, dict[str, Any]]
) -> None:
    (said, body), (path, more) = saying, api

    async def answer(saying: Saying) -> Any:
        async with (
            serving(ladder, engine=SayingEngine(saying), max_restarts=9) as served,
            served.client() as client,
        ):
            answer = await client.post(path, json={**body, **more})
            assert served.is_idle
            return answer

    undisturbed = asyncio.run(answer(Saying(said.text, said.step_tokens)))
    disturbed = asyncio.run(answer(said))
    assert heard(disturbed) == heard(undisturbed)
    assert _without_names(disturbed.text) == _without_names(undisturbed.text)


async def test_an_answer_that_was_replayed_before_its_head_says_so(ladder: Ladder) -> None:
    async def replayed(*deaths: int, stream: bool = False) -> str | None:
        body = {"model": "fake", "prompt": "hi", "max_tokens": 6, "stream": stream}
        async with serving(ladder, engine=SayingEngine(Saying("said again", 1, deaths))) as served:
            client = client_of(ResponseTime(served.app))
            return (await client.post("/v1/completions", json=body)).headers.get(REPLAYED_HEADER)

    assert await replayed() is None
    assert await replayed(3) == "1"
    assert await replayed(3, 1) == "2"
    assert await replayed(3, stream=True) is None  # the head is out by then
    assert await replayed(0, stream=True) == "1"


def _without_names(text: str) -> str:
    """Each answer has a name and a time of its own."""
    return re.sub(r'"(id|created)":("[^"]*"|\d+)', r'"\1":0', text)
