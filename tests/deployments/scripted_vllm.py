"""vLLM's own front over an engine that says given tokens. Has no tests.

AsyncLLM, the OpenAI layer and its parsers are vLLM's; EngineCore is not there.
"""

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from samples import SETTINGS
from starlette.types import ASGIApp
from test_openai_harness import Ladder
from test_saying_engine import Saying
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.outputs import LogprobsLists

from cluster.demo_model import build_demo_model
from cluster.demo_tokens import IM_END
from deployments.engines import vllm_front
from deployments.engines.fake import FakeEngine, _Sequence
from deployments.engines.protocol import Sampling, TokenRequest
from deployments.engines.vllm import resumed
from deployments.engines.vllm_notes import VLLMNotation
from deployments.engines.vllm_plugin import EMITTED
from deployments.keeper import Keeper
from deployments.policy import fixed
from deployments.relay.copies import Copies
from deployments.restarts import RestartLimit
from deployments.supervisor import Supervisor
from vram.settings import EngineSettings

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def build_marked_model(folder: Path) -> None:
    """The demo model with a token for each mark, which parsers look for; without weights."""
    build_demo_model(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = tokenizer["added_tokens"]
    first = max(token["id"] for token in added) + 1
    added += [
        {**added[-1], "id": number, "content": mark, "special": False}
        for number, mark in enumerate(MARKS, first)
    ]
    path.write_text(json.dumps(tokenizer))


class ScriptedCore(FakeEngine):
    """Engine[EngineCoreRequest]: says a text, another one for each further choice, and dies."""

    def __init__(self, saying: Saying, encode: Callable[[str], Sequence[int]]) -> None:
        super().__init__(saying.script)
        self.entered: list[EngineCoreRequest] = []  # as EngineCore would have got them
        self.core = SimpleNamespace(
            get_supported_tasks_async=_supported_tasks, add_lora_async=_added
        )
        self._saying = saying
        self._encode = encode

    async def generate(  # type: ignore[override]
        self, request: EngineCoreRequest, emitted: Sequence[int]
    ) -> None:
        entered = resumed(request, emitted)
        self.entered.append(entered)
        params, tokens = entered.sampling_params, entered.prompt_token_ids
        assert params is not None
        assert params.max_tokens is not None
        assert tokens is not None
        num_emitted = (params.extra_args or {}).get(EMITTED, 0)
        again = TokenRequest(
            request_id=request.request_id,
            prompt_token_ids=(),
            sampling=Sampling(max_tokens=params.max_tokens, logprobs=params.logprobs),
        )
        await super().generate(again, tokens[len(tokens) - num_emitted :])

    def _advance(self, sequence: _Sequence) -> Any:
        choice, is_one_of_several, _ = sequence.request.request_id.partition("_")
        said = self._encode(self._saying.text + choice * bool(is_one_of_several) + IM_END)
        begin, limit = len(sequence.output), sequence.request.sampling.max_tokens
        new = said[begin : min(begin + self._saying.step_tokens, limit)]
        sequence.output.extend(new)
        reason = FinishReason.LENGTH if len(sequence.output) >= limit else None
        if len(sequence.output) == len(said):
            reason = FinishReason.STOP
        return EngineCoreOutput(
            request_id=sequence.request.request_id,
            new_token_ids=list(new),
            new_logprobs=_logprobs(new, sequence.request.sampling.logprobs),
            finish_reason=reason,
        )


class Front:
    """One AsyncLLM and its server, to be put over one scripted engine after the other."""

    def __init__(
        self, model: Path, settings: EngineSettings = SETTINGS, **engine_args: Any
    ) -> None:
        self._args = vllm_front.front_args(str(model), "fake", engine_args)
        config = vllm_front.make_config(self._args, settings)
        self._core = vllm_front.JournaledCore()
        self._llm = vllm_front.make_llm(self._core, config, joins_deltas=False)
        self._app: Any = None

    @asynccontextmanager
    async def over(
        self, ladder: Ladder, saying: Saying, *, is_noted: bool = False
    ) -> AsyncIterator[tuple[ScriptedCore, ASGIApp]]:
        """The engine, and the server over it; `is_noted` as with `recovery.survive_replica`."""
        engine = ScriptedCore(saying, self.tokens_of)
        copies = Copies(VLLMNotation(), self._core.on_step) if is_noted else None
        tell = copies.on_step if copies else self._core.on_step
        keeper: Any = Keeper(
            "fake",
            engine,  # type: ignore[arg-type]
            Supervisor(ladder(0)[0], fixed(ladder), RestartLimit(max_restarts=9, window_s=600.0)),
            on_step=lambda step: tell(EngineCoreOutputs(outputs=list(step.outputs))),
            on_give_up=self._core.on_give_up,
            on_refusal=self._core.on_refusal,
        )
        self._core.attach(copies.above(keeper) if copies else keeper, engine)  # type: ignore[arg-type]
        if self._app is None:
            self._app = await vllm_front.make_app(self._llm, self._args)
        await keeper.start()
        try:
            yield engine, self._app
            assert not len(keeper.journal), "nothing is left to replay"
        finally:
            await keeper.stop()

    def tokens_of(self, text: str) -> Sequence[int]:
        tokens: list[int] = self._llm.renderer.tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def close(self) -> None:
        self._llm.shutdown()


async def _supported_tasks() -> tuple[str, ...]:
    return ("generate",)


async def _added(adapter: Any) -> bool:
    return True


def _logprobs(token_ids: Sequence[int], num_top: int | None) -> LogprobsLists | None:
    """Of each token by its number, with the tokens after it as the alternatives."""
    if num_top is None:
        return None
    ids = np.array([[t + n for n in range(num_top + 1)] for t in token_ids], dtype=np.int32)
    values = -(ids % 97).astype(np.float32) / 8
    return LogprobsLists(ids, values, np.ones(len(token_ids), dtype=np.int32), None)
