"""One case in one mode, in this process and its children, on the one card that it sees.

    CUDA_VISIBLE_DEVICES=0 python -m benchmarks.rescue.trial "CASE" MODE MODELS RESULT.json

Modes: `plain` is vLLM's own AsyncLLM with the settings asked for; `fixed` and `diagnose` are
Ballast's keeper with that policy and without the check before a load, so that each error has to be
read; `ballast` is `diagnose` with the check, as it comes. Ray is left out: it takes no part in a
rescue.
Waits for a line on standard input before it touches the card, so that imports don't count.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pynvml

from benchmarks.memory.load import prepare_imports
from benchmarks.rescue.cases import BY_NAME, Case, Outcome

PROMPT_TOKENS, NEW_TOKENS = 16, 8
EARLY_REQUESTS, LOAD_PROMPT_TOKENS, LOAD_NEW_TOKENS = 16, 256, 256
DEAD_PROCESS = 2**22 - 1  # an owner that no machine has


class TenantProcess:
    """The other process on the card."""

    def __init__(self, case: Case, total_bytes: int) -> None:
        tenant = case.tenant
        assert tenant is not None
        env = dict(os.environ)
        if tenant.is_orphan:
            from deployments.processes import MARK, OWNER

            env |= {MARK: "0" * 32, OWNER: f"{DEAD_PROCESS}-1"}
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.rescue.tenant"),
                str(int(total_bytes * tenant.share)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def tell(self, word: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        self._process.stdout.readline()


def main() -> None:
    name, mode, models, result = sys.argv[1:]
    case = BY_NAME[name]
    prepare_imports()
    pynvml.nvmlInit()
    index = int(os.environ["CUDA_VISIBLE_DEVICES"])
    total_bytes = int(
        pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index)).total
    )
    tenant = TenantProcess(case, total_bytes) if case.tenant else None
    if not sys.stdin.readline():
        return
    if tenant is not None:
        tenant.tell("go")
    folder = f"{models}/{case.model}"
    if mode == "plain":
        outcome = asyncio.run(_plain(case, folder, tenant))
    else:
        outcome = asyncio.run(_ballast(case, mode, folder, tenant, index))
    Path(result).write_text(json.dumps(asdict(outcome)))
    os._exit(0)  # whatever is left is ended with this process group


async def _plain(case: Case, folder: str, tenant: TenantProcess | None) -> Outcome:
    """vLLM's engine as its own server starts it."""
    import vllm
    from vllm.v1.engine.async_llm import AsyncLLM

    began_s = time.monotonic()
    outcome = Outcome(case=case.name, mode="plain", served=False, reason="", seconds=0.0)
    arguments = vllm.AsyncEngineArgs(
        model=folder, load_format="dummy", skip_tokenizer_init=True, **case.asked
    )
    try:
        llm = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
        await _first_answer(llm, vllm)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return replace(outcome, reason=reason, seconds=round(time.monotonic() - began_s, 1))
    seconds = round(time.monotonic() - began_s, 1)
    outcome = replace(outcome, served=True, seconds=seconds, **_kept(llm.vllm_config))
    if case.num_requests > 1:
        outcome = await _load(llm, vllm, case, tenant, outcome)
        outcome = replace(outcome, served=outcome.requests_failed == 0)
    return outcome


async def _first_answer(llm: Any, vllm: Any) -> None:
    sampling = vllm.SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    await _one(llm, 0, PROMPT_TOKENS, sampling)


def _kept(config: Any) -> dict[str, int]:
    cache = config.cache_config
    return {
        "max_model_len": config.model_config.max_model_len,
        "kv_cache_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
    }


def _prompt(number: int, length: int) -> list[int]:
    """Each its own, so that no prompt is found in the prefix cache."""
    return [300 + (number * 7919 + position * 31) % 20_000 for position in range(length)]


async def _ballast(
    case: Case, mode: str, folder: str, tenant: TenantProcess | None, index: int
) -> Outcome:
    import vllm
    from vllm import plugins

    from deployments import cards, orphans, recovery
    from deployments.engines import vllm_front
    from deployments.engines.vllm import VLLMEngine
    from deployments.errors import LadderExhausted
    from deployments.keeper import Keeper
    from deployments.load_check import LoadCheck

    async def here(placement_group: Any) -> tuple[cards.Card, ...]:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        free_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
        return (cards.Card(node_id="here", index=index, free_bytes=free_bytes),)

    cards.cards_of = here
    began_s = time.monotonic()
    config, plan = _plan(case, mode, folder)
    args = vllm_front.front_args(folder, "trial", dict(config.engine_args))

    def make_config(settings: Any) -> Any:
        vllm_config = vllm_front.make_config(args, settings)
        plugins.plugins_loaded = False  # the engine is forked from here and has to load its own
        return vllm_config

    engine = VLLMEngine(make_config)
    core = vllm_front.JournaledCore()
    keeper: Keeper[Any] = Keeper(
        "trial",
        engine,
        recovery.supervisor_of(config, plan),
        on_step=core.on_step,
        on_give_up=core.on_give_up,
        before_load=LoadCheck(config, plan, None),
    )
    core.attach(keeper, engine)
    outcome = Outcome(case=case.name, mode=mode, served=False, reason="", seconds=0.0)
    try:
        await orphans.reap()
        await keeper.start()
        assert engine.config is not None
        llm = vllm_front.make_llm(core, engine.config)
        await _first_answer(llm, vllm)
        outcome = replace(outcome, served=True)
    except LadderExhausted as error:
        outcome = replace(outcome, reason=str(error)[:600])
    outcome = replace(outcome, seconds=round(time.monotonic() - began_s, 1))
    if outcome.served and case.num_requests > 1:
        outcome = await _load(llm, vllm, case, tenant, outcome)
    steps = [
        f"{attempt.price}: {attempt.death or 'serving'}"[:300]
        for attempt in keeper.supervisor.attempts
    ]
    if outcome.served:
        outcome = replace(outcome, **_kept(engine.core.vllm_config))
    await keeper.stop()
    return replace(outcome, steps=steps)


def _plan(case: Case, mode: str, folder: str) -> tuple[Any, Any]:
    """The settings asked for, as a plan that nobody checked."""
    from deployments.config import DeviceConfig, ModelConfig, RecoveryConfig
    from deployments.shapes import shape_of
    from vram.defaults import settings_for
    from vram.estimate import estimate
    from vram.plan import Plan

    config = ModelConfig(
        name="trial",
        model=folder,
        device=DeviceConfig(name="H200"),
        skip_vram_check=mode != "ballast",
        engine_args={"load_format": "dummy", "skip_tokenizer_init": True},
        recovery=RecoveryConfig(policy="fixed" if mode == "fixed" else "diagnose"),
    )
    shape, device = shape_of(config), config.device.device()
    settings = replace(
        settings_for(shape, config.wishes(), device, "vllm", 1, 1),
        **{"kv_cache_memory_bytes": None, **case.asked},
    )
    plan = Plan(
        settings=settings,
        estimate=estimate(shape, settings, device, "vllm"),
        device=device,
        engine="vllm",
        gpu_fraction=1.0,
        notes=(),
    )
    return config, plan


async def _load(
    llm: Any, vllm: Any, case: Case, tenant: TenantProcess | None, outcome: Outcome
) -> Outcome:
    """A few requests first; when the other process has grown, all the others at once."""
    sampling = vllm.SamplingParams(max_tokens=LOAD_NEW_TOKENS, ignore_eos=True, detokenize=False)

    def ask(numbers: range, prompt_tokens: int) -> list[asyncio.Task[int]]:
        tasks = (_one(llm, number, prompt_tokens, sampling) for number in numbers)
        return [asyncio.create_task(task) for task in tasks]

    requests = ask(range(EARLY_REQUESTS), PROMPT_TOKENS)
    await asyncio.to_thread(_grow, tenant, case)
    requests += ask(range(EARLY_REQUESTS, case.num_requests), LOAD_PROMPT_TOKENS)
    counts = await asyncio.gather(*requests, return_exceptions=True)
    finished = sum(count == LOAD_NEW_TOKENS for count in counts)
    first_error = next((str(count) for count in counts if isinstance(count, Exception)), "")
    return replace(
        outcome,
        reason=first_error[:300],
        requests_ok=finished,
        requests_failed=case.num_requests - finished,
    )


def _grow(tenant: TenantProcess | None, case: Case) -> None:
    if tenant is not None and case.tenant is not None and case.tenant.leaves_bytes is not None:
        tenant.tell(f"rest {case.tenant.leaves_bytes}")


async def _one(llm: Any, number: int, prompt_tokens: int, sampling: Any) -> int:
    prompt = {"prompt_token_ids": _prompt(number, prompt_tokens)}
    num_tokens = 0
    async for output in llm.generate(prompt, sampling, request_id=f"r{number}-{prompt_tokens}"):
        num_tokens = len(output.outputs[0].token_ids)
    return num_tokens


if __name__ == "__main__":
    main()
