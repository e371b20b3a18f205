"""A replayed request asks vLLM for what the first one asked: its adapter, its seed, all of it."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from samples import SETTINGS
from test_openai_harness import Ladder, client_of
from test_saying_engine import Saying

pytest.importorskip("vllm")

import msgspec
from scripted_vllm import Front, build_marked_model

from deployments.engines.vllm_plugin import EMITTED, PROMPT

# No engine is started, but all of vLLM is imported. It calls what it has itself deprecated.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

ADAPTERS = [{"name": "first", "path": "adapters/1"}, {"name": "second", "path": "adapters/2"}]
ASKED = {
    "prompt": "hi",
    "max_tokens": 9,
    "min_tokens": 3,
    "temperature": 0.7,
    "seed": 5,
    "presence_penalty": 0.5,
    "logit_bias": {"7": 1},
    "stop": ["zz"],
    "cache_salt": "mine",
    "priority": 0,
}


class Fronted:
    """A front that has two adapters, and the loop that it belongs to."""

    def __init__(self, front: Front, runner: asyncio.Runner) -> None:
        self._front, self._runner = front, runner

    def asked(self, ladder: Ladder, saying: Saying, **more: Any) -> tuple[Any, list[Any]]:
        """An answer, and the requests that engines were handed for it."""

        async def ask() -> tuple[Any, list[Any]]:
            async with self._front.over(ladder, saying) as (engine, app), client_of(app) as client:
                answer = await client.post("/v1/completions", json={**ASKED, **more})
                return answer, engine.entered

        return self._runner.run(ask())


@pytest.fixture(scope="module")
def fronted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronted]:
    folder = tmp_path_factory.mktemp("resumed") / "model"
    build_marked_model(folder)

    async def make() -> Front:
        settings = replace(SETTINGS, max_loras=2)
        return Front(folder, settings, lora_modules=ADAPTERS)

    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        front = runner.run(make())
        yield Fronted(front, runner)
        runner.run(asyncio.to_thread(front.close))


@pytest.mark.parametrize("model", ["fake", "first", "second"])
def test_a_replayed_request_is_the_same_but_for_its_tokens(
    ladder: Ladder, fronted: Fronted, model: str
) -> None:
    answer, entered = fronted.asked(ladder, Saying("0123456789", 1, (4, 2)), model=model)
    assert answer.json()["choices"][0]["text"] == "012345678"
    assert [len(request.prompt_token_ids) for request in entered] == [1, 5, 7]
    assert entered[0].sampling_params.seed == ASKED["seed"]
    adapter = entered[0].lora_request
    assert (adapter and adapter.lora_name) == (None if model == "fake" else model)
    for replayed in entered[1:]:
        assert _without_tokens(replayed) == _without_tokens(entered[0])


def test_an_adapter_that_is_not_there_is_not_found(ladder: Ladder, fronted: Fronted) -> None:
    answer, entered = fronted.asked(ladder, Saying("said"), model="third")
    assert (answer.status_code, entered) == (404, [])


def _without_tokens(request: Any) -> dict[str, Any]:
    asked = msgspec.structs.asdict(request)
    extra = dict(request.sampling_params.extra_args or {})
    num_emitted = extra.pop(EMITTED, 0)
    assert num_emitted == len(request.prompt_token_ids) - extra.pop(PROMPT, 1)
    params = msgspec.structs.asdict(request.sampling_params)
    return {**asked, "prompt_token_ids": None, "sampling_params": {**params, "extra_args": extra}}
