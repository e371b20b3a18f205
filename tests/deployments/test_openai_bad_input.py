"""Everything that a client can do wrong: a 4xx that names the field, never a 500."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic_core import to_json
from test_openai_harness import Ladder, serving

from deployments.openai.errors import RequestError
from deployments.openai.requests import ChatRequest, CompletionRequest, parse

HI = [{"role": "user", "content": "hi"}]


def check_error(body: dict[str, Any], param: str | None, *words: str) -> None:
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", ["EOF"]),
        (b"", ["EOF"]),
        (b"[1, 2]", ["JSON object"]),
        (b'"text"', ["JSON object"]),
        (b'{"prompt": "\xff\xfe"}', ["unicode"]),
        (b'{"prompt": "\\ud800"}', []),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ["recursion"]),
        (b'{"a":' * 100_000, ["recursion"]),
        ('{"prompt": "a"}'.encode("utf-16"), []),
        (b"prompt=hello&max_tokens=5", []),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_body_that_is_no_json_object_is_a_400(
    ladder: Ladder, path: str, body: bytes, words: list[str]
) -> None:
    async with serving(ladder) as served, served.client() as client:
        response = await client.post(path, content=body)
        assert response.status_code == 400
        check_error(response.json(), None, *words)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None),
        ("prompt", 5),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", 5]),
        ("prompt", [True]),
        ("prompt", [1.5]),
        ("prompt", {"a": 1}),
        ("prompt", [-1]),
        ("prompt", [256]),
        ("prompt", ""),
        ("prompt", ["a", ""]),
        ("prompt", ["a"] * 1025),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 10**9),
        ("max_tokens", 10**400),
        ("max_tokens", "5"),
        ("max_tokens", 5.5),
        ("max_tokens", True),
        ("max_tokens", [5]),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "0.7"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("n", 0),
        ("n", 129),
        ("n", "2"),
        ("seed", 2**63),
        ("seed", "x"),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 5),
        ("stop", [5]),
        ("stop", 5),
        ("stop", "x" * 1025),
        ("stream", "yes"),
        ("stream", 1),
        ("stream_options", {"include_usage": True}),
        ("ignore_eos", "no"),
        ("echo", "no"),
        ("model", 5),
        ("suffix", "end"),
        ("best_of", 3),
        ("response_format", {"type": "json_object"}),
        ("response_format", "json"),
        ("logit_bias", {"50": 100}),
        ("stop_token_ids", [5]),
    ],
)
async def test_a_wrong_field_of_a_completion_is_named(
    ladder: Ladder, field: str, value: Any
) -> None:
    async with serving(ladder) as served, served.client() as client:
        asked = {"model": "fake", "prompt": "hello", field: value}
        response = await client.post("/v1/completions", json=asked)
        assert response.status_code == 400
        check_error(response.json(), field, field)
        assert served.is_idle


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("messages", None, "messages"),
        ("messages", [], "messages"),
        ("messages", "hi", "messages"),
        ("messages", ["hi"], "messages[0]"),
        ("messages", [{"content": "hi"}], "messages[0].role"),
        ("messages", [{"role": "king", "content": "hi"}], "messages[0].role"),
        ("messages", [*HI, {"role": "user", "content": 5}], "messages[1].content"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
        ("max_completion_tokens", 0, "max_completion_tokens"),
        ("max_completion_tokens", 10**9, "max_completion_tokens"),
        ("max_tokens", -1, "max_tokens"),
        ("logprobs", 3, "logprobs"),
        ("top_logprobs", 3, "top_logprobs"),
        ("top_logprobs", 21, "top_logprobs"),
        ("tools", [{"type": "function", "function": {"name": "f"}}], "tools"),
        ("functions", [{"name": "f"}], "functions"),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
            "response_format",
        ),
        ("chat_template_kwargs", {"tokenize": True}, "chat_template_kwargs.tokenize"),
        ("chat_template_kwargs", 5, "chat_template_kwargs"),
    ],
)  # fmt: skip
async def test_a_wrong_field_of_a_chat_is_named(
    ladder: Ladder, field: str, value: Any, param: str
) -> None:
    async with serving(ladder) as served, served.client() as client:
        asked = {"model": "fake", "messages": HI, field: value}
        response = await client.post("/v1/chat/completions", json=asked)
        assert response.status_code == 400
        check_error(response.json(), param, param)


@pytest.mark.parametrize("max_tokens", [0, -1, 10**9, 2044])
async def test_a_wrong_max_tokens_is_told_the_context_and_what_is_left(
    ladder: Ladder, max_tokens: int
) -> None:
    async with serving(ladder) as served, served.client() as client:
        asked = {"prompt": "hello", "max_tokens": max_tokens}
        response = await client.post("/v1/completions", json=asked)
        assert response.status_code == 400
        check_error(response.json(), "max_tokens", str(max_tokens), "2043", "2048")


async def test_a_number_that_is_none_is_named(ladder: Ladder) -> None:
    async with serving(ladder) as served, served.client() as client:
        body = b'{"prompt": "a", "temperature": NaN}'
        response = await client.post("/v1/completions", content=body)
        assert response.status_code == 400
        check_error(response.json(), "temperature")


async def test_a_prompt_longer_than_the_context_is_told_both_numbers(ladder: Ladder) -> None:
    async with serving(ladder) as served, served.client() as client:
        long = "a" * 3000
        completion = await client.post("/v1/completions", json={"prompt": long})
        messages = [{"role": "user", "content": long}]
        chat = await client.post("/v1/chat/completions", json={"messages": messages})
        assert (completion.status_code, chat.status_code) == (400, 400)
        check_error(completion.json(), "prompt", "3000", "2048")
        check_error(chat.json(), "messages", "3018", "2048")
        assert chat.json()["error"]["code"] == "context_length_exceeded"


async def test_a_refused_field_says_which_engine_can(ladder: Ladder) -> None:
    async with serving(ladder) as served, served.client() as client:
        asked = {"messages": HI, "response_format": {"type": "json_object"}}
        response = await client.post("/v1/chat/completions", json=asked)
        check_error(response.json(), "response_format", "'vllm'")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_an_unknown_model_is_a_404_that_names_the_known_one(
    ladder: Ladder, path: str
) -> None:
    async with serving(ladder) as served, served.client() as client:
        asked = {"model": "other", "prompt": "a", "messages": HI}
        response = await client.post(path, json=asked)
        card = await client.get("/v1/models/some/other")
        assert (response.status_code, card.status_code) == (404, 404)
        check_error(response.json(), "model", "'other'", "'fake'")
        assert response.json()["error"]["code"] == "model_not_found"


async def test_unknown_paths_and_methods_have_openai_s_shape(ladder: Ladder) -> None:
    async with serving(ladder) as served, served.client() as client:
        unknown = await client.get("/v1/nothing")
        wrong = await client.get("/v1/completions")
        assert (unknown.status_code, wrong.status_code) == (404, 405)
        check_error(unknown.json(), None)
        check_error(wrong.json(), None)
        assert wrong.headers["allow"] == "POST"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def error_of(kind: type[CompletionRequest] | type[ChatRequest], body: bytes) -> RequestError | None:
    try:
        parse(kind, body)
    except RequestError as error:
        return error
    return None


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_value_in_any_field_is_taken_or_refused_by_name(data: st.DataObject) -> None:
    for kind, rest in ((CompletionRequest, {"prompt": "a"}), (ChatRequest, {"messages": HI})):
        field = data.draw(st.sampled_from([*kind.model_fields, "tools", "response_format"]))
        body = to_json({**rest, field: data.draw(JSON_VALUES)})
        error = error_of(kind, body)
        assert error is None or (error.param or "").startswith(field)


async def test_a_million_wrong_items_make_one_error(ladder: Ladder) -> None:
    async with serving(ladder) as served, served.client() as client:
        prompt = await client.post("/v1/completions", json={"prompt": [1.5] * 1_000_000})
        messages = await client.post("/v1/chat/completions", json={"messages": [5] * 1_000_000})
        assert len(prompt.content) < 500
        assert len(messages.content) < 500
