"""Reasoning and tool calls over a seam: vLLM's own parsers, on tokens that are given to them.

The engine dies below vLLM's front, or the replica dies with it: at any token of a block of
reasoning, of a call's name or of its arguments, the client hears what it hears undisturbed.
"""

import asyncio
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_openai_harness import Ladder, client_of
from test_relay import InTurn, Mortal, asked, heard, relay_of
from test_saying_engine import Saying

from deployments.relay.port import ReplicaPort

pytest.importorskip("vllm")

from scripted_vllm import Front, build_marked_model

# No engine is started, but all of vLLM is imported. It calls what it has itself deprecated.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

PARSERS = [
    ("hermes", "qwen3"),
    ("hermes", "deepseek_r1"),
    ("qwen3_coder", "qwen3"),
    ("pythonic", None),
]
SCHEMA = {"properties": {"words": {"type": "string"}, "number": {"type": "integer"}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", **SCHEMA}}}
    for name in ("say", "sing")
]
ARGUMENTS = {"words": "a 😀, drei äöü – 你好 क्षि", "number": 7}
WORDS = st.text(st.sampled_from("ab stop.\näß😀👩‍👩‍👧你क्षि{}[]\"'<>\\"), max_size=20)
PATH = "/v1/chat/completions"
slow_to_begin = settings(deadline=None, suppress_health_check=list(HealthCheck))


class Parsing:
    """A front with its parsers, and how a model speaks that they are for."""

    def __init__(self, folder: Path, tools: str, reasoning: str | None) -> None:
        self.tools, self.reasoning = tools, reasoning
        self.runner = asyncio.Runner()  # vLLM's front belongs to one loop
        options = {"reasoning_parser": reasoning} if reasoning else {}
        self.front = self.runner.run(self._make(folder, options))

    async def _make(self, folder: Path, options: dict[str, Any]) -> Front:
        return Front(folder, enable_auto_tool_choice=True, tool_call_parser=self.tools, **options)

    def thought(self, text: str) -> str:
        return f"<think>\n{text}\n</think>\n\n" if self.reasoning else ""

    def called(self, name: str, arguments: dict[str, Any]) -> str:
        match self.tools:
            case "hermes":
                call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
                return f"<tool_call>\n{call}\n</tool_call>\n"
            case "pythonic":
                given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
                return f"[{name}({given})]"
        given = "".join(
            f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items()
        )
        return f"<tool_call>\n<function={name}>\n{given}</function>\n</tool_call>\n"

    def over_engines(self, ladder: Ladder, saying: Saying, body: dict[str, Any]) -> Any:
        """What a client hears while engines die as `saying` has it."""

        async def ask() -> Any:
            async with (
                self.front.over(ladder, saying) as (_, app),
                client_of(app) as client,
            ):
                return heard(await client.post(PATH, json={"model": "fake", **body}))

        return _without_names(self.runner.run(ask()))

    def over_replicas(
        self, ladder: Ladder, saying: Saying, body: dict[str, Any], deaths: list[int]
    ) -> Any:
        """What the client of a relay hears while replicas die after so many bytes."""

        async def ask() -> Any:
            async with (
                self.front.over(ladder, saying, is_noted=True) as (_, app),
                AsyncExitStack() as s,
            ):
                port = ReplicaPort(app, replica="r", has_given_up=lambda: False, beat_s=0.02)
                real = await port.open("127.0.0.1")
                s.push_async_callback(port.close)
                mortals = [
                    await s.enter_async_context(Mortal(real, after_bytes=death).listening())
                    for death in deaths
                ]
                return heard(await asked(relay_of(InTurn([*mortals, real])), PATH, body))

        return _without_names(self.runner.run(ask()))


@pytest.fixture(scope="module", params=PARSERS, ids=lambda names: "-".join(filter(None, names)))
def parsing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Parsing]:
    folder = tmp_path_factory.mktemp("marked") / "model"
    build_marked_model(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        parsing = Parsing(folder, *request.param)
        yield parsing
        parsing.runner.run(asyncio.to_thread(parsing.front.close))
        parsing.runner.close()


def test_each_token_of_reasoning_and_of_a_call_may_be_an_engine_s_last(
    ladder: Ladder, parsing: Parsing
) -> None:
    text = parsing.thought("I 😀 think") + parsing.called("say", ARGUMENTS)
    body = asking(stream=True)
    undisturbed = parsing.over_engines(ladder, Saying(text), body)
    choice = undisturbed[0][0]
    name, arguments, num_ids = choice["tools"][0]
    assert (name, json.loads(arguments), num_ids) == ("say", ARGUMENTS, 1)
    assert choice["reasoning"].strip() == ("I 😀 think" if parsing.reasoning else "")
    for death in range(0, len(parsing.front.tokens_of(text)), 3):
        disturbed = parsing.over_engines(ladder, Saying(text, 1, (death, 1)), body)
        assert disturbed == undisturbed, death


def asking(*, stream: bool, **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, "stream": stream}
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    return {**body, "max_tokens": 400, **usage, **more}


@st.composite
def answers(draw: st.DrawFn, parsing: Parsing) -> Saying:
    """A thought, words, and calls, in steps of several tokens."""
    text = parsing.thought(draw(WORDS))
    arguments = st.fixed_dictionaries({}, optional={"words": WORDS, "number": st.integers()})
    most = 2 if parsing.tools != "pythonic" else 1
    names = draw(st.lists(st.sampled_from(["say", "sing"]), max_size=most))
    if not names or parsing.tools != "pythonic":
        text += draw(WORDS)
    text += "".join(parsing.called(name, draw(arguments)) for name in names)
    return Saying(text, draw(st.integers(1, 4)))


@st.composite
def bodies(draw: st.DrawFn, *, stream: bool) -> dict[str, Any]:
    logprobs = {"logprobs": True, "top_logprobs": 1} if draw(st.booleans()) else {}
    return asking(
        stream=stream,
        n=draw(st.integers(1, 3)),
        max_tokens=draw(st.integers(1, 300)),
        seed=draw(st.integers(0, 9)),
        **logprobs,
    )


@slow_to_begin
@given(data=st.data())
def test_parsers_do_not_see_where_an_engine_died(
    ladder: Ladder, parsing: Parsing, data: st.DataObject
) -> None:
    saying = data.draw(answers(parsing))
    body = data.draw(bodies(stream=data.draw(st.booleans())))
    deaths = data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=4))
    disturbed = Saying(saying.text, saying.step_tokens, tuple(deaths))
    expected = parsing.over_engines(ladder, saying, body)
    assert parsing.over_engines(ladder, disturbed, body) == expected


@slow_to_begin
@given(data=st.data())
def test_parsers_of_another_replica_make_the_same_of_what_was_said(
    ladder: Ladder, parsing: Parsing, data: st.DataObject
) -> None:
    saying, body = data.draw(answers(parsing)), data.draw(bodies(stream=True))
    deaths = data.draw(st.lists(st.integers(0, 12_000), min_size=1, max_size=4))
    expected = parsing.over_replicas(ladder, saying, body, [])
    assert parsing.over_replicas(ladder, saying, body, deaths) == expected


def _without_names(answer: Any) -> Any:
    """Each call of a tool has a name of its own."""
    match answer:
        case int(), {"choices": [*choices]}:
            for choice in choices:
                for call in choice["message"].get("tool_calls") or ():
                    call["id"] = None
    return answer
