"""One vLLM load in this process: start it, put it under load, say what the device holds.

Waits for a line on its standard input before it touches the GPU, so that the imports of the next
load overlap the run of this one. Writes its facts after every stage: a later stage may end it.
"""

import argparse
import importlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pynvml

IMPORTS = ("vllm", "vllm.v1.engine.core", "vllm.v1.worker.gpu_worker")
WORKER = "benchmarks.memory.worker.MeasuredWorker"
FIRST_TOKEN, LAST_TOKEN = 300, 20_000  # inside every vocabulary that was measured
PLAIN_REQUESTS, PLAIN_PROMPT_TOKENS, PLAIN_NEW_TOKENS = 64, 512, 64
HARD_PROMPT_TOKENS, HARD_NEW_TOKENS, BRIEF_NEW_TOKENS = 32, 24, 8
LONG_STEPS = 2  # the hard load's long prompts fill max_num_batched_tokens this many times


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("model_folder", type=Path)
    arguments.add_argument("engine_args", type=json.loads)
    arguments.add_argument("facts_path", type=Path)
    options = arguments.parse_args()
    started = time.monotonic()
    vllm = prepare_imports()
    engine_args = {
        "model": str(options.model_folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "worker_cls": WORKER,
        **options.engine_args,
    }
    with suppress(Exception):  # vLLM keeps what it learns of a model's class; the load says errors
        vllm.EngineArgs(**engine_args).create_engine_config()
    facts: dict[str, Any] = {
        "import_s": round(time.monotonic() - started, 1),
        "cuda_before_start": sys.modules["torch"].cuda.is_initialized(),
        "stages": [],
    }
    if not sys.stdin.readline():
        return
    started = time.monotonic()
    try:
        llm = vllm.LLM(**engine_args)
        facts["load_s"] = round(time.monotonic() - started, 1)
        facts["settings"] = effective_settings(llm.llm_engine.vllm_config)
        run_stages(llm, facts, options.facts_path, vllm.SamplingParams)
    except BaseException as error:
        # The parent's view of a death, whatever its class: that is what is measured here.
        facts["error_type"] = f"{type(error).__module__}.{type(error).__name__}"
        facts["error"] = str(error)[:1000]
        facts["died_after_s"] = round(time.monotonic() - started, 1)
    _write(options.facts_path, facts)
    os._exit(0)  # engine processes are ended by whoever started this one


def prepare_imports() -> ModuleType:
    """All that the engine's process would import: it is forked from this one."""
    for name in IMPORTS:
        importlib.import_module(name)
    return sys.modules["vllm"]


def run_stages(llm: Any, facts: dict[str, Any], path: Path, sampling: Callable[..., Any]) -> None:
    settings = facts["settings"]
    draws = random.Random(0)
    stages: dict[str, Callable[[], None]] = {
        "loaded": lambda: None,
        "requests_64": lambda: _generate(
            llm,
            [_tokens(draws, PLAIN_PROMPT_TOKENS) for _ in range(PLAIN_REQUESTS)],
            sampling(max_tokens=PLAIN_NEW_TOKENS, ignore_eos=True, temperature=0, detokenize=False),
        ),
        "full_batch": lambda: _generate(
            llm,
            hard_prompts(draws, settings),
            sampling(
                max_tokens=BRIEF_NEW_TOKENS, ignore_eos=True, detokenize=False, temperature=1.0
            ),
        ),
        "top_p": lambda: _generate(
            llm,
            hard_prompts(draws, settings),
            sampling(
                max_tokens=BRIEF_NEW_TOKENS,
                ignore_eos=True,
                detokenize=False,
                temperature=1.0,
                top_p=0.9,
                top_k=50,
            ),
        ),
        "hard": lambda: _generate(
            llm,
            hard_prompts(draws, settings),
            sampling(
                max_tokens=HARD_NEW_TOKENS,
                ignore_eos=True,
                detokenize=False,
                temperature=1.0,
                top_p=0.9,
                top_k=50,
                logprobs=5,
            ),
        ),
        "penalties": lambda: _generate(
            llm,
            hard_prompts(draws, settings)[LONG_STEPS:],
            sampling(
                max_tokens=BRIEF_NEW_TOKENS,
                ignore_eos=True,
                detokenize=False,
                temperature=1.0,
                min_p=0.05,
                logprobs=20,
                repetition_penalty=1.1,
                frequency_penalty=0.1,
            ),
        ),
        "prompt_logprobs": lambda: _generate(
            llm,
            hard_prompts(draws, settings)[:1],
            sampling(max_tokens=1, detokenize=False, prompt_logprobs=1),
        ),
    }
    for name, run in stages.items():
        started = time.monotonic()
        facts["stage"] = name
        run()
        facts["stages"].append(
            {
                "stage": name,
                "seconds": round(time.monotonic() - started, 2),
                "device_used_bytes": devices_used_bytes(),
                "ranks": llm.collective_rpc("memory_now"),
            }
        )
        _write(path, facts)
    del facts["stage"]


def hard_prompts(draws: random.Random, settings: dict[str, Any]) -> list[list[int]]:
    """A few prompts as long as batches, then as many short ones as may run at once."""
    context_tokens = settings["max_model_len"] - HARD_NEW_TOKENS - 1
    long_tokens = min(context_tokens, settings["max_num_batched_tokens"])
    short_tokens = min(context_tokens, HARD_PROMPT_TOKENS)
    long = [_tokens(draws, long_tokens) for _ in range(LONG_STEPS)]
    return long + [_tokens(draws, short_tokens) for _ in range(settings["max_num_seqs"])]


def effective_settings(config: Any) -> dict[str, Any]:
    """What vLLM made of the arguments: its defaults depend on the card."""
    graph_sizes = config.compilation_config.cudagraph_capture_sizes or []
    return {
        "max_model_len": config.model_config.max_model_len,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "gpu_memory_utilization": config.cache_config.gpu_memory_utilization,
        "block_size": config.cache_config.block_size,
        "num_gpu_blocks": config.cache_config.num_gpu_blocks,
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "enable_prefix_caching": config.cache_config.enable_prefix_caching,
        "enable_chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        "async_scheduling": config.scheduler_config.async_scheduling,
        "dtype": str(config.model_config.dtype),
        "quantization": config.model_config.quantization,
        "enforce_eager": config.model_config.enforce_eager,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "cudagraph_captures": len(graph_sizes),
        "cudagraph_largest": max(graph_sizes, default=0),
    }


def devices_used_bytes() -> list[int]:
    """Per GPU and for all processes on it, as NVML says."""
    pynvml.nvmlInit()
    handles = [
        pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
    ]
    return [pynvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles]


def _generate(llm: Any, prompts: list[list[int]], sampling: Any) -> None:
    llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], sampling, use_tqdm=False)


def _tokens(draws: random.Random, count: int) -> list[int]:
    """Random, so that no prompt is found in the prefix cache."""
    return draws.choices(range(FIRST_TOKEN, LAST_TOKEN), k=count)


def _write(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
