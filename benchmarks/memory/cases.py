"""Which loads are measured, the most telling first. Plain values; starts nothing."""

from dataclasses import dataclass, field
from typing import Any

EXPECTED_S = 45.0  # a campaign starts no case that is expected to outlast its time
# vLLM's fused all-reduce and its symmetric memory use NVLink multicast, which is off on the host.
NO_MULTICAST = {
    "distributed_executor_backend": "mp",
    "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One load: a model of models.py and the engine arguments it is given."""

    model: str
    engine_args: dict[str, Any] = field(default_factory=dict)
    expected_s: float = EXPECTED_S

    @property
    def name(self) -> str:
        settings = [f"{key}={value}" for key, value in sorted(self.engine_args.items())]
        return " ".join([self.model, *settings])


def case(
    model: str,
    max_model_len: int = 8192,
    gpu_memory_utilization: float = 0.9,
    expected_s: float = EXPECTED_S,
    **more: Any,
) -> Case:
    return Case(
        model=model,
        engine_args={
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            **more,
        },
        expected_s=expected_s,
    )


def split(model: str, **more: Any) -> Case:
    return case(model, tensor_parallel_size=2, expected_s=70.0, **NO_MULTICAST, **more)


ONE_GPU = (
    case("qwen2.5-1.5b"),
    case("llama-3.1-8b", 131072),
    case("gemma-2-9b"),
    # The settings of vLLM's own server on this card.
    case("llama-3.1-8b", max_num_batched_tokens=8192, max_num_seqs=256),
    case("qwen2.5-7b", quantization="fp8"),
    case("qwen3-8b", 16384, 0.7, kv_cache_dtype="fp8"),
    case("qwen2.5-14b", max_num_batched_tokens=4096, max_num_seqs=64),
    case("mistral-7b", 32768, 0.6, max_num_batched_tokens=2048),
    # Fails: 16 GiB for one sequence, 10 left.
    case("llama-3.1-8b", 131072, 0.2, enforce_eager=True),
    case("qwen2.5-32b", expected_s=60.0),
    case("llama-2-7b", 4096, 0.5, enforce_eager=True, max_num_batched_tokens=8192),
    case("qwen3-30b-a3b", 32768, 0.8, 70.0, max_num_batched_tokens=8192, max_num_seqs=256),
    # Fails: the weights alone take the budget.
    case("qwen2.5-32b", 8192, 0.45, enforce_eager=True),
    case("qwen2.5-0.5b", 4096, 0.3, max_num_batched_tokens=2048, max_num_seqs=64),
    case("qwen2.5-1.5b", max_num_batched_tokens=32768, max_num_seqs=256),
    case("phi-3-mini", 4096, 0.4),
    # Fails: 262 GiB of weights.
    case("mixtral-8x22b", enforce_eager=True),
    case("deepseek-v2-lite", 16384, 0.8),
    case("qwen3-0.6b", 32768, 0.95, max_num_batched_tokens=8192),
    case("llama-3.2-1b", 131072, 0.5, max_num_seqs=256),
    case("gemma-3-1b", 32768, 0.4),
    # Fails: the context of the process itself leaves less than that.
    case("qwen2.5-0.5b", 4096, 0.999),
    case("mixtral-8x7b", 32768, expected_s=60.0),
    case("qwen3-4b", 32768, 0.5, max_num_batched_tokens=4096, max_num_seqs=512),
    case("mistral-7b-v0.1", 32768, 0.5, max_num_batched_tokens=8192),
    case("gpt-oss-20b", 32768, 0.6, 60.0, max_num_seqs=256),
    # The first one again, its kernels now compiled before: does the cache change the memory?
    case("qwen2.5-1.5b", seed=1),
    case("qwen2.5-7b", kv_cache_memory_bytes=16 * 2**30),
    case("qwen2.5-14b", 8192, 0.5, quantization="fp8", kv_cache_dtype="fp8", enforce_eager=True),
    case("qwen1.5-moe-a2.7b", 8192, 0.5, max_num_batched_tokens=8192),
    case("qwen3-30b-a3b", 8192, 0.5, 70.0, quantization="fp8", max_num_seqs=64),
    case("qwen2.5-1.5b", 8192, 0.9, enforce_eager=True, max_num_batched_tokens=4096),
)

TWO_GPUS = (
    split("qwen2.5-7b"),
    split("llama-3.1-8b", max_num_batched_tokens=8192, max_num_seqs=256),
    split("qwen2.5-32b"),
    split("qwen3-30b-a3b"),
    split("qwen2.5-7b", enforce_eager=True, max_num_batched_tokens=32768),
    split("qwen3-0.6b", max_num_batched_tokens=2048, max_num_seqs=64),
)

LISTS = {"one": ONE_GPU, "two": TWO_GPUS}
