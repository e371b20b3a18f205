"""The server as its users see it, through the OpenAI client."""

import openai
import pytest
from server import Server

pytestmark = pytest.mark.serve


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)


def test_both_models_are_listed_at_one_address(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"demo", "demo-hf"}
    assert client.models.retrieve("demo").id == "demo"


def test_a_chat_streams_with_usage(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_both_engines_say_the_same_of_the_same_model(client: openai.OpenAI) -> None:
    texts = [
        client.completions.create(model=m, prompt="Once", max_tokens=32, temperature=0)
        .choices[0]
        .text
        for m in ("demo", "demo-hf")
    ]
    assert texts[0] == texts[1]


def test_sampling_options_are_taken(client: openai.OpenAI, model: str) -> None:
    options = {"top_k": 5, "ignore_eos": True, "min_tokens": 3}
    run = {
        "model": model, "prompt": "Once", "max_tokens": 8, "temperature": 0.8, "top_p": 0.9,
        "seed": 7, "n": 2, "logprobs": 2, "presence_penalty": 0.5, "frequency_penalty": 0.5,
        "extra_body": options,
    }  # fmt: skip
    first = client.completions.create(**run)  # type: ignore[call-overload]
    again = client.completions.create(**run)  # type: ignore[call-overload]
    assert [c.text for c in first.choices] == [c.text for c in again.choices]
    assert len(first.choices) == 2
    assert len(first.choices[0].logprobs.tokens) == 8
    assert first.usage.completion_tokens == 16


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client: openai.OpenAI, model: str) -> None:
    whole = client.completions.create(model=model, prompt="Once", max_tokens=40, temperature=0)
    stop = whole.choices[0].text[20:25]
    cut = client.completions.create(
        model=model, prompt="Once", max_tokens=40, temperature=0, stop=stop
    )
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == whole.choices[0].text[: whole.choices[0].text.index(stop)]


def test_json_by_schema_where_the_engine_can(client: openai.OpenAI) -> None:
    import json

    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    run = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 60, "temperature": 0}
    answer = client.chat.completions.create(model="demo", response_format=form, **run)  # type: ignore[call-overload]
    assert isinstance(json.loads(answer.choices[0].message.content)["ok"], bool)
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(model="demo-hf", response_format=form, **run)  # type: ignore[call-overload]
