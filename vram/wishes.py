"""What a user may pin before the rest is chosen."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the user pins; None leaves the choice to the plan.

    `context` and `concurrency` are the least that will do: so many requests at once, each of so
    many tokens, prompt and answer, all of them in the KV cache.
    """

    context: int | None = None
    concurrency: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    enforce_eager: bool | None = None
    max_loras: int | None = None  # None: without adapters
    max_lora_rank: int | None = None
    gpu_fraction: float | None = None
    max_gpus: int = 1  # how many the plan may take when the split is not pinned
