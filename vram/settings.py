"""The engine settings that decide memory, all of them filled. Knows no engine's argument names."""

import dataclasses
import math
from dataclasses import dataclass

from vram.dtypes import canonical_dtype, kv_cache_bytes
from vram.errors import Invalid

LARGEST_CONTEXT_TOKENS = 1 << 27
LARGEST_SEQUENCES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine is started with. A smaller attempt is a new value made by replace()."""

    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    tensor_parallel_size: int
    pipeline_parallel_size: int
    enforce_eager: bool
    # What few engines are started with; 0 and False are without.
    expert_parallel: bool = False
    max_loras: int = 0
    max_lora_rank: int = 16
    num_speculative_tokens: int = 0
    enable_prefix_caching: bool = True
    # What steps down after a death of memory turn.
    max_cudagraph_capture_size: int | None = None  # tokens; None leaves it to the engine
    expandable_segments: bool = False  # of torch's CUDA allocator

    def __post_init__(self) -> None:
        canonical_dtype(self.dtype)
        kv_cache_bytes(self.kv_cache_dtype, self.dtype)
        _between("max_model_len", self.max_model_len, 1, LARGEST_CONTEXT_TOKENS)
        _between("max_num_seqs", self.max_num_seqs, 1, LARGEST_SEQUENCES)
        _between("max_num_batched_tokens", self.max_num_batched_tokens, 1, LARGEST_CONTEXT_TOKENS)
        _between("tensor_parallel_size", self.tensor_parallel_size, 1, 1024)
        _between("pipeline_parallel_size", self.pipeline_parallel_size, 1, 1024)
        _between("max_loras", self.max_loras, 0, 1024)
        _between("max_lora_rank", self.max_lora_rank, 1, 1024)
        _between("num_speculative_tokens", self.num_speculative_tokens, 0, 64)
        if self.max_cudagraph_capture_size is not None:
            captured = self.max_cudagraph_capture_size
            _between("max_cudagraph_capture_size", captured, 1, LARGEST_CONTEXT_TOKENS)
        if not (
            math.isfinite(self.gpu_memory_utilization) and 0 < self.gpu_memory_utilization <= 1
        ):
            raise Invalid(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; "
                "it is a share of the card, above 0 and at most 1",
                "gpu_memory_utilization",
            )
        if self.kv_cache_memory_bytes is not None and self.kv_cache_memory_bytes < 1:
            raise Invalid(
                f"kv_cache_memory_bytes is {self.kv_cache_memory_bytes}; it is at least 1",
                "kv_cache_memory_bytes",
            )

    @property
    def num_gpus(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size


def owned_settings() -> tuple[str, ...]:
    """Settings that are planned or pinned, and so not for `engine_args`."""
    names = tuple(field.name for field in dataclasses.fields(EngineSettings))
    return tuple(name for name in names if name != "max_cudagraph_capture_size")


def _between(setting: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise Invalid(f"{setting} is {value}; it is {lowest} to {highest}", setting)
