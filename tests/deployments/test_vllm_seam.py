"""Whatever a request asks of vLLM, a seam in its answer changes nothing.

One real engine. Replicas die in front of it, at some byte of an answer; the next one is told the
tokens so far and hands the request to the engine with them, as after a death of the engine itself.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from test_openai_harness import until
from test_relay import InTurn, Mortal, asked, heard, relay_of
from tiny_adapter import build_adapter

from cluster.demo_model import build_demo_model
from deployments.app import make_plan
from deployments.config import DeviceConfig, ModelConfig, RecoveryConfig
from deployments.keeper import Keeper
from deployments.relay.port import Address, ReplicaPort
from deployments.supervisor import State

pytest.importorskip("vllm")

from deployments.serving import start_serving

# vLLM and torch call what they themselves have deprecated.
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.asyncio(loop_scope="module"),
]

DEATHS_AFTER_BYTES = (0, 900, 3000, 7000)
JSON_SCHEMA = {
    "type": "object",
    "properties": {
        "words": {
            "type": "array",
            "items": {"type": "string", "maxLength": 12},
            "minItems": 3,
            "maxItems": 3,
        }
    },
    "required": ["words"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "say", "parameters": JSON_SCHEMA}}
LONG = {"max_tokens": 90, "ignore_eos": True}
SEVERAL = {"temperature": 0.5, "top_k": 1}  # as greedy, of which vLLM gives one choice only
CASES: dict[str, dict[str, Any]] = {
    "limits": {**LONG, "min_tokens": 80},
    "minimum": {"max_tokens": 120, "min_tokens": 70, "stop": ["a", "e"]},
    "stop": {**LONG, "stop": ["va", "zz top"]},
    "choices": {**LONG, **SEVERAL, "n": 3},
    "logprobs": {**LONG, "logprobs": 2},
    "penalties": {**LONG, "presence_penalty": 0.9, "frequency_penalty": 0.7},
    "repetition": {**LONG, "repetition_penalty": 1.3},
    "echo": {**LONG, "echo": True},
    "echo logprobs": {**LONG, "echo": True, "logprobs": 1},
    "prompt logprobs": {**LONG, "prompt_logprobs": 1, "stream": False},
    "adapter": {**LONG, "model": "tiny"},
    "adapter choices": {**LONG, **SEVERAL, "model": "tiny", "n": 2, "logprobs": 1},
    "json": {"max_tokens": 400, "structured_outputs": {"json": JSON_SCHEMA}},
}
CHAT_CASES: dict[str, dict[str, Any]] = {
    "chat": LONG,
    "chat choices": {**LONG, **SEVERAL, "n": 2, "logprobs": True, "top_logprobs": 2},
    "chat json": {
        "max_tokens": 400,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "w", "schema": JSON_SCHEMA},
        },
    },
    "chat tool": {
        "max_tokens": 400,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "say"}},
    },
    "chat any tool": {"max_tokens": 90, "tools": [TOOL], "tool_choice": "auto"},
}
ASKED = [
    *(("/v1/completions", name, {"prompt": "once upon", **case}) for name, case in CASES.items()),
    *(
        ("/v1/chat/completions", name, {"messages": [{"role": "user", "content": "hi"}], **case})
        for name, case in CHAT_CASES.items()
    ),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def kept(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[Address, Keeper[Any]]]:
    model: Path = tmp_path_factory.mktemp("seam") / "model"
    build_demo_model(model)
    build_adapter(model.parent / "adapter")
    config = ModelConfig(
        name="fake",  # what `asked` asks for
        model=str(model),
        device=DeviceConfig(kind="cpu", memory_gib=4),
        dtype="float32",
        max_model_len=2048,
        enforce_eager=True,
        max_loras=1,
        skip_vram_check=True,
        recovery=RecoveryConfig(survive_replica=True),
        engine_args={
            "lora_modules": [{"name": "tiny", "path": str(model.parent / "adapter")}],
            "enable_auto_tool_choice": True,
            "tool_call_parser": "hermes",
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")  # two would spin on the cores of the rest
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        serving = await start_serving(config, make_plan(config)[0], placement_group=None)
        keeper = serving.keeper
        port = ReplicaPort(
            serving.app,
            replica="r",
            has_given_up=lambda: keeper.state is State.FAILED,
            beat_s=0.02,
        )
        yield await port.open("127.0.0.1"), keeper
        await port.close()
        await keeper.stop()


@pytest.fixture
def real(kept: tuple[Address, Keeper[Any]]) -> Address:
    return kept[0]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(("path", "name", "body"), ASKED, ids=[name for _, name, _ in ASKED])
async def test_an_answer_is_the_same_over_its_seams(
    real: Address, path: str, name: str, body: dict[str, Any], stream: bool
) -> None:
    stream = stream and body.get("stream", True)
    body = {"temperature": 0, **body, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    undisturbed = await asked(relay_of(InTurn([real])), path, body)
    assert undisturbed.status_code == 200, undisturbed.text
    async with AsyncExitStack() as stack:
        mortals = [
            await stack.enter_async_context(Mortal(real, after_bytes=death).listening())
            for death in DEATHS_AFTER_BYTES
        ]
        disturbed = await asked(relay_of(InTurn([*mortals, real])), path, body)
    assert heard(disturbed) == heard(undisturbed)


async def test_an_adapter_answers_otherwise_than_its_model(real: Address) -> None:
    """Else the cases that ask for one would not show that a replay keeps it."""
    body = {"prompt": "once upon", "temperature": 0, **LONG}
    plain, adapted = [
        (await asked(relay_of(InTurn([real])), "/v1/completions", {**body, "model": model})).json()
        for model in ("fake", "tiny")
    ]
    assert adapted["model"] == "tiny"
    assert adapted["choices"][0]["text"] != plain["choices"][0]["text"]


async def test_the_random_numbers_of_an_answer_s_beginning_are_not_used_again_in_its_middle(
    real: Address,
) -> None:
    """Ten tokens that are always equally likely, so that a draw shows its random number."""
    digits = {str(ord(digit)): 100 for digit in "0123456789"}
    body = {"prompt": "once upon", "stream": True, "seed": 7, "logit_bias": digits, **LONG}

    async def drawn(*addresses: Address) -> str:
        answer = heard(await asked(relay_of(InTurn(addresses)), "/v1/completions", body))
        text: str = answer[0][0]["text"]
        return text

    undisturbed = await drawn(real)
    assert undisturbed.isdigit()
    assert await drawn(real) == undisturbed
    async with Mortal(real, after_bytes=9000).listening() as mortal:
        disturbed = await drawn(mortal, real)
    assert len(disturbed) == len(undisturbed)
    assert disturbed[:10] == undisturbed[:10]
    for seam in range(10, len(undisturbed) - 10):
        assert disturbed[seam:] != undisturbed[: len(undisturbed) - seam]


async def test_two_streams_at_once_do_not_hear_each_other_s_notes(real: Address) -> None:
    async def one(prompt: str, *deaths: int) -> Any:
        body = {"prompt": prompt, "stream": True, "temperature": 0, **LONG}
        async with AsyncExitStack() as stack:
            mortals = [
                await stack.enter_async_context(Mortal(real, after_bytes=death).listening())
                for death in deaths
            ]
            return heard(await asked(relay_of(InTurn([*mortals, real])), "/v1/completions", body))

    expected = [await one("first"), await one("second")]
    assert await asyncio.gather(one("first", 3000, 6000), one("second", 4000, 5000)) == expected


async def test_an_adapter_s_stream_goes_on_in_an_engine_that_never_had_it(
    kept: tuple[Address, Keeper[Any]],
) -> None:
    real, keeper = kept
    body = {"model": "tiny", "prompt": "once upon", "stream": True, "temperature": 0, **LONG}
    body["max_tokens"] = 900

    async def answer() -> Any:
        return heard(await asked(relay_of(InTurn([real])), "/v1/completions", body))

    undisturbed = await answer()
    asking = asyncio.create_task(answer())
    generation, num_replayed = keeper.supervisor.generation, keeper.num_replayed
    await until(lambda: any(n > 20 for n in keeper.journal.num_emitted(generation).values()))
    os.kill((await keeper.engine.measure()).process_ids[0], signal.SIGKILL)
    assert await asking == undisturbed
    assert keeper.supervisor.generation == generation + 1
    assert keeper.num_replayed == num_replayed + 1
