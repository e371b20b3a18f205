"""What is answered, in OpenAI's shapes; in-process."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from test_openai_harness import FAST, Ladder, answer_of, serving, texts_of

from deployments.engines.fake import FakeEngine
from deployments.engines.protocol import Sampling, TokenDelta, TokenLogprob, TokenRequest

CHAT_PROMPT = "user: hi\nassistant: "
HI = [{"role": "user", "content": "hi"}]


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


class WatchingEngine(FakeEngine):
    """Remembers what it was asked, and gives log probabilities to those who want them."""

    def __init__(self) -> None:
        super().__init__(FAST)
        self.asked: list[TokenRequest] = []
        self.num_generated = 0

    async def generate(self, request: TokenRequest, emitted: Any) -> None:
        self.asked.append(request)
        await super().generate(request, emitted)

    def _advance(self, sequence: Any) -> TokenDelta:
        self.num_generated += 1
        delta = super()._advance(sequence)
        num_alternatives = sequence.request.sampling.logprobs
        if num_alternatives is None:
            return delta
        (token,) = delta.new_token_ids
        others = tuple((other, float("-inf")) for other in range(97, 97 + num_alternatives))
        return replace(delta, logprobs=(TokenLogprob(token_id=token, logprob=-0.5, top=others),))


async def test_a_completion_has_text_usage_and_reason(ladder: Ladder) -> None:
    async with serving(ladder) as served, served.client() as client:
        asked = {"model": "fake", "prompt": "hello", "max_tokens": 20}
        body = (await client.post("/v1/completions", json=asked)).json()
        answer = Completion.model_validate(body)
        assert answer.choices[0].text == answer_of("hello", 20)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.model_dump(exclude_none=True) == {
            "prompt_tokens": 5,
            "completion_tokens": 20,
            "total_tokens": 25,
        }
        assert served.is_idle


async def test_a_chat_answer_follows_the_template(ladder: Ladder) -> None:
    async with serving(ladder) as served, served.client() as client:
        asked = {"model": "fake", "messages": HI, "max_completion_tokens": 12}
        body = (await client.post("/v1/chat/completions", json=asked)).json()
        answer = ChatCompletion.model_validate(body)
        assert answer.choices[0].message.content == answer_of(CHAT_PROMPT, 12)
        assert answer.choices[0].message.role == "assistant"
        assert answer.id.startswith("chatcmpl-")


async def test_a_streamed_completion_says_the_same(ladder: Ladder) -> None:
    async with serving(ladder) as served, served.client() as client:
        asked = {"prompt": "hello", "max_tokens": 20, "stream": True}
        events = events_of(await client.post("/v1/completions", json=asked))
        assert texts_of(events) == {0: answer_of("hello", 20)}
        reasons = [event["choices"][0]["finish_reason"] for event in events]
        assert reasons == [None] * (len(events) - 1) + ["length"]
        assert len({event["id"] for event in events}) == 1
        assert "usage" not in events[-1]


async def test_a_streamed_chat_begins_with_the_role(ladder: Ladder) -> None:
    async with serving(ladder) as served, served.client() as client:
        asked = {"messages": HI, "max_tokens": 20, "stream": True}
        events = events_of(await client.post("/v1/chat/completions", json=asked))
        for event in events:
            ChatCompletionChunk.model_validate(event)
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert texts_of(events) == {0: answer_of(CHAT_PROMPT, 20)}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_the_usage_ends_a_stream_that_asks_for_it(ladder: Ladder, path: str) -> None:
    async with serving(ladder) as served, served.client() as client:
        asked = {
            "prompt": CHAT_PROMPT,
            "messages": HI,
            "max_tokens": 6,
            "n": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        last = events_of(await client.post(path, json=asked))[-1]
        assert last["choices"] == []
        assert last["usage"] == {
            "prompt_tokens": len(CHAT_PROMPT),
            "completion_tokens": 12,
            "total_tokens": len(CHAT_PROMPT) + 12,
        }


@pytest.mark.parametrize("stream", [False, True])
async def test_each_prompt_gets_n_choices_in_order(ladder: Ladder, stream: bool) -> None:
    async with serving(ladder) as served, served.client() as client:
        asked = {"prompt": ["one", "two"], "n": 2, "max_tokens": 8, "stream": stream}
        response = await client.post("/v1/completions", json=asked)
        if stream:
            texts = texts_of(events_of(response))
        else:
            texts = {choice["index"]: choice["text"] for choice in response.json()["choices"]}
            assert response.json()["usage"]["prompt_tokens"] == 6
        one, two = answer_of("one", 8), answer_of("two", 8)
        assert texts == {0: one, 1: one, 2: two, 3: two}


@pytest.mark.parametrize(
    "prompt", ["abc", ["abc"], [97, 98, 99], [[97, 98, 99]]], ids=["text", "texts", "ids", "lists"]
)
async def test_a_prompt_may_be_text_or_tokens(ladder: Ladder, prompt: Any) -> None:
    async with serving(ladder) as served, served.client() as client:
        body = (await client.post("/v1/completions", json={"prompt": prompt})).json()
        assert body["choices"][0]["text"] == answer_of("abc", 16)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
async def test_a_stop_string_ends_the_answer_and_frees_the_slot(
    ladder: Ladder, stream: bool, as_list: bool
) -> None:
    full = answer_of("hello", 200)
    stop = full[20:23]
    engine = WatchingEngine()
    async with serving(ladder, engine=engine) as served, served.client() as client:
        asked = {
            "prompt": "hello",
            "max_tokens": 2000,
            "stop": ["\n\n", stop] if as_list else stop,
            "stream": stream,
        }
        response = await client.post("/v1/completions", json=asked)
        if stream:
            events = events_of(response)
            text, reason = texts_of(events)[0], events[-1]["choices"][0]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            text, reason = choice["text"], choice["finish_reason"]
            assert response.json()["usage"]["completion_tokens"] == full.index(stop) + 3
        assert (text, reason) == (full[: full.index(stop)], "stop")
        assert engine.num_generated < 200  # of 2000
        assert served.is_idle


async def test_a_chat_goes_on_to_the_end_of_the_context(ladder: Ladder) -> None:
    async with serving(ladder) as served, served.client() as client:
        body = (await client.post("/v1/chat/completions", json={"messages": HI})).json()
        assert body["usage"]["total_tokens"] == 2048
        assert body["choices"][0]["finish_reason"] == "length"


async def test_a_completion_stops_after_16_tokens_or_at_the_end_of_the_context(
    ladder: Ladder,
) -> None:
    async with serving(ladder) as served, served.client() as client:
        short = await client.post("/v1/completions", json={"prompt": "hello"})
        long = await client.post("/v1/completions", json={"prompt": "a" * 2040})
        numbers = [each.json()["usage"]["completion_tokens"] for each in (short, long)]
        assert numbers == [16, 8]


async def test_echo_repeats_the_prompt(ladder: Ladder) -> None:
    async with serving(ladder) as served, served.client() as client:
        for prompt in ("hello", [*b"hello"]):
            for stream in (False, True):
                asked = {"prompt": prompt, "echo": True, "max_tokens": 4, "stream": stream}
                response = await client.post("/v1/completions", json=asked)
                text = (
                    texts_of(events_of(response))[0]
                    if stream
                    else response.json()["choices"][0]["text"]
                )
                assert text == "hello" + answer_of("hello", 4)


async def test_the_engine_hears_every_sampling_field(ladder: Ladder) -> None:
    engine = WatchingEngine()
    async with serving(ladder, engine=engine) as served, served.client() as client:
        asked = {
            "prompt": "hello",
            "max_tokens": 9,
            "min_tokens": 3,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "presence_penalty": 0.1,
            "frequency_penalty": -0.2,
            "repetition_penalty": 1.1,
            "seed": 40,
            "logprobs": 2,
            "ignore_eos": True,
            "n": 2,
        }
        await client.post("/v1/completions", json=asked)
        first = Sampling(
            max_tokens=9,
            min_tokens=3,
            temperature=0.5,
            top_p=0.9,
            top_k=7,
            presence_penalty=0.1,
            frequency_penalty=-0.2,
            repetition_penalty=1.1,
            seed=40,
            logprobs=2,
            ignore_eos=True,
        )
        assert [each.sampling for each in engine.asked] == [first, replace(first, seed=41)]


@pytest.mark.parametrize(("asked", "heard"), [(0, 0.0), (1e-9, 0.0), (1e-4, 0.01), (2, 2.0)])
async def test_a_temperature_near_zero_is_greedy(
    ladder: Ladder, asked: float, heard: float
) -> None:
    engine = WatchingEngine()
    async with serving(ladder, engine=engine) as served, served.client() as client:
        await client.post("/v1/completions", json={"prompt": "hello", "temperature": asked})
        assert engine.asked[0].sampling.temperature == heard


async def test_fields_that_clients_send_along_do_no_harm(ladder: Ladder) -> None:
    async with serving(ladder) as served, served.client() as client:
        parts = [{"type": "text", "text": "hi"}]
        asked = {
            "messages": [{"role": "user", "name": "me", "content": parts}],
            "max_tokens": 5,
            "user": "somebody",
            "metadata": {"a": "b"},
            "store": False,
            "service_tier": "auto",
            "parallel_tool_calls": True,
            "response_format": {"type": "text"},
            "tools": [],
            "tool_choice": "none",
            "logit_bias": {},
            "temperature": None,
            "stop": None,
            "seed": None,
            "stream_options": None,
            "some_new_field": {"x": 1},
        }
        response = await client.post("/v1/chat/completions", json=asked)
        content = response.json()["choices"][0]["message"]["content"]
        assert content == answer_of(CHAT_PROMPT, 5)


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_log_probabilities(ladder: Ladder, stream: bool) -> None:
    async with serving(ladder, engine=WatchingEngine()) as served, served.client() as client:
        asked = {
            "messages": HI,
            "max_tokens": 4,
            "logprobs": True,
            "top_logprobs": 2,
            "stream": stream,
        }
        response = await client.post("/v1/chat/completions", json=asked)
        if stream:
            choices = [event["choices"][0] for event in events_of(response)]
            content = [
                entry
                for choice in choices
                if choice["logprobs"]
                for entry in choice["logprobs"]["content"]
            ]
        else:
            content = response.json()["choices"][0]["logprobs"]["content"]
        text = answer_of(CHAT_PROMPT, 4)
        assert [entry["token"] for entry in content] == list(text)
        assert content[0]["logprob"] == -0.5
        assert content[0]["bytes"] == list(text[0].encode())
        assert content[0]["top_logprobs"] == [
            {"token": "a", "bytes": [97], "logprob": -9999.0},
            {"token": "b", "bytes": [98], "logprob": -9999.0},
        ]


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_log_probabilities(ladder: Ladder, stream: bool) -> None:
    async with serving(ladder, engine=WatchingEngine()) as served, served.client() as client:
        asked = {"prompt": "hello", "max_tokens": 4, "logprobs": 0, "stream": stream}
        response = await client.post("/v1/completions", json=asked)
        found = events_of(response) if stream else [response.json()]
        logprobs = [event["choices"][0]["logprobs"] for event in found]
        text = answer_of("hello", 4)
        assert [token for each in logprobs for token in each["tokens"]] == list(text)
        assert [at for each in logprobs for at in each["text_offset"]] == [0, 1, 2, 3]
        assert [p for each in logprobs for p in each["token_logprobs"]] == [-0.5] * 4
        tops = [top for each in logprobs for top in each["top_logprobs"]]
        assert tops == [{letter: -0.5} for letter in text]


async def test_text_goes_out_as_it_is(ladder: Ladder) -> None:
    asked = {"prompt": 'line\n"quoted" \\ ünï 😀 \u2028', "echo": True, "max_tokens": 1}
    async with serving(ladder) as served, served.client() as client:
        whole = await client.post("/v1/completions", json=asked)
        stream = await client.post("/v1/completions", json={**asked, "stream": True})
        text = asked["prompt"] + answer_of(asked["prompt"], 1)
        assert whole.json()["choices"][0]["text"] == text
        assert texts_of(events_of(stream)) == {0: text}


async def test_the_model_is_listed_with_its_context(ladder: Ladder) -> None:
    async with serving(ladder) as served, served.client() as client:
        listed = (await client.get("/v1/models")).json()
        card = (await client.get("/v1/models/fake")).json()
        assert listed == {"object": "list", "data": [card]}
        assert (card["id"], card["object"], card["max_model_len"]) == ("fake", "model", 2048)
