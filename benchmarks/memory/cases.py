"""Which loads are measured, the most telling first. Plain values; starts nothing."""

from dataclasses import dataclass
from typing import Any

# A campaign starts no case that is expected to outlast its time.
EXPECTED_S, EXPECTED_EAGER_S = 42.0, 26.0
# vLLM's fused all-reduce and its symmetric memory use NVLink multicast, which is off on the host.
NO_MULTICAST = {
    "distributed_executor_backend": "mp",
    "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One load: a model of models.py, the engine arguments it is given, variables added."""

    model: str
    engine_args: dict[str, Any]
    expected_s: float
    environment: dict[str, str]

    @property
    def name(self) -> str:
        given = {**self.engine_args, **self.environment}
        return " ".join([self.model, *(f"{key}={value}" for key, value in sorted(given.items()))])


def case(
    model: str,
    max_model_len: int = 8192,
    gpu_memory_utilization: float = 0.9,
    expected_s: float | None = None,
    environment: dict[str, str] | None = None,
    **more: Any,
) -> Case:
    usual_s = EXPECTED_EAGER_S if more.get("enforce_eager") else EXPECTED_S
    return Case(
        model=model,
        engine_args={
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            **more,
        },
        expected_s=usual_s if expected_s is None else expected_s,
        environment=environment or {},
    )


def split(model: str, **more: Any) -> Case:
    return case(model, tensor_parallel_size=2, expected_s=60.0, **NO_MULTICAST, **more)


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
    # Fails: 16 GiB for one sequence, 11 left.
    case("llama-3.1-8b", 131072, 0.2, enforce_eager=True),
    case("qwen2.5-32b", expected_s=60.0),
    case("llama-2-7b", 4096, 0.5, enforce_eager=True, max_num_batched_tokens=8192),
    # Fails: the weights alone take the budget.
    case("qwen2.5-32b", 8192, 0.45, enforce_eager=True),
    case("qwen2.5-0.5b", 4096, 0.3, max_num_batched_tokens=2048, max_num_seqs=64),
    case("qwen3-30b-a3b", 32768, 0.8, 70.0, max_num_batched_tokens=8192, max_num_seqs=256),
    case("llama-3.1-8b", 8192, 0.5, 26.0, enforce_eager=True, max_num_batched_tokens=4096),
    # Fails: 262 GiB of weights.
    case("mixtral-8x22b", enforce_eager=True),
    case("qwen2.5-1.5b", max_num_batched_tokens=32768, max_num_seqs=256),
    case("phi-3-mini", 4096, 0.4),
    # Fails: the context of the process itself leaves less than that.
    case("qwen2.5-0.5b", 4096, 0.999, enforce_eager=True),
    case("deepseek-v2-lite", 16384, 0.8),
    case("gemma-3-1b", 32768, 0.4),
    case("gpt-oss-20b", 32768, 0.6, 60.0, max_num_seqs=256),
    case("qwen3-0.6b", 32768, 0.95, max_num_batched_tokens=8192),
    case("mixtral-8x7b", 32768, enforce_eager=True),
    case("qwen2.5-14b", 8192, 0.5, quantization="fp8", kv_cache_dtype="fp8", enforce_eager=True),
    case("llama-3.2-1b", 131072, 0.5, max_num_seqs=256, enforce_eager=True),
    # Is it the allocator's fragments that the device holds beyond the budget?
    case("qwen2.5-1.5b", environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
    case("qwen1.5-moe-a2.7b", 8192, 0.5, max_num_batched_tokens=8192, enforce_eager=True),
    case("qwen3-4b", 32768, 0.5, max_num_batched_tokens=4096, max_num_seqs=512),
    case("mistral-7b-v0.1", 32768, 0.5, max_num_batched_tokens=8192, enforce_eager=True),
    case("qwen2.5-7b", kv_cache_memory_bytes=16 * 2**30, enforce_eager=True),
    # The first one again, its kernels compiled before: does that change the memory?
    case("qwen2.5-1.5b", expected_s=30.0, seed=1),
    case("qwen3-30b-a3b", 8192, 0.5, 70.0, quantization="fp8", max_num_seqs=64),
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
