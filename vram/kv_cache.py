"""Tokens to bytes and back, in the pages of a KV cache. Knows no budget."""

from dataclasses import dataclass

from vram.dtypes import kv_cache_bytes
from vram.gpu import Device
from vram.model import ModelShape
from vram.settings import EngineSettings
from vram.units import ceil_div
from vram.weights import layers_per_stage

# Tokens of one page. vLLM: 16 on CUDA (config/cache.py), 128 on the CPU (platforms/cpu.py);
# TensorRT-LLM: tokens_per_block 32. Transformers and SGLang keep single tokens.
PAGE_TOKENS = {
    ("vllm", "cuda"): 16,
    ("vllm", "cpu"): 128,
    ("fake", "cuda"): 16,
    ("fake", "cpu"): 128,
    ("tensorrt_llm", "cuda"): 32,
}

# vLLM 0.29 schedules one batch while another runs (config/vllm.py::max_concurrent_batches), and
# a windowed layer keeps the tokens of both.
BATCHES_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PageGroup:
    """Layers that share one block table: all of them full, or all with the same window."""

    num_layers: int  # vLLM pads the last group of a kind to the size of the others
    window_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """How one GPU pages the cache of one model."""

    groups: tuple[PageGroup, ...]
    page_tokens: int
    token_bytes_per_layer: int
    in_flight_tokens: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers, while every layer still sees it."""
        return self.token_bytes_per_layer * sum(group.num_layers for group in self.groups)

    def sequence_bytes(self, context_tokens: int) -> int:
        """What one sequence of this length takes at most, in whole pages."""
        return sum(
            self._pages(group, context_tokens)
            * self.page_tokens
            * self.token_bytes_per_layer
            * group.num_layers
            for group in self.groups
        )

    def tokens(self, cache_bytes: int, context_tokens: int) -> int:
        """Tokens that fit when every sequence is this long: vLLM's "GPU KV cache size"."""
        page_bytes = self.page_tokens * self.token_bytes_per_layer * self.groups[0].num_layers
        num_pages = max(cache_bytes, 0) // page_bytes
        if len(self.groups) == 1 and self.groups[0].window_tokens is None:
            return num_pages * self.page_tokens
        pages_per_sequence = sum(self._pages(group, context_tokens) for group in self.groups)
        return num_pages * context_tokens // pages_per_sequence

    def longest_context(self, cache_bytes: int, highest: int) -> int:
        """The longest single sequence that this many bytes hold, at most `highest`; 0 for none."""
        shortest, longest = 0, highest
        while shortest < longest:
            middle = (shortest + longest + 1) // 2
            if self.sequence_bytes(middle) <= cache_bytes:
                shortest = middle
            else:
                longest = middle - 1
        return shortest

    def _pages(self, group: PageGroup, context_tokens: int) -> int:
        if group.window_tokens is None:
            return ceil_div(context_tokens, self.page_tokens)
        # v1/kv_cache_interface.py::SlidingWindowSpec of vLLM 0.29; one page more because the
        # window need not begin where a page does.
        kept = min(group.window_tokens - 1 + self.in_flight_tokens, context_tokens)
        return ceil_div(kept, self.page_tokens) + 1


def cache_layout(
    shape: ModelShape, settings: EngineSettings, device: Device, engine: str
) -> CacheLayout:
    """The pages of this model on the GPU that holds the most layers."""
    kv_heads_per_gpu = ceil_div(shape.num_kv_heads, settings.tensor_parallel_size)
    return CacheLayout(
        groups=_groups(shape, settings.pipeline_parallel_size),
        page_tokens=PAGE_TOKENS.get((engine, device.kind), 1),
        token_bytes_per_layer=(
            2  # key and value
            * kv_heads_per_gpu
            * shape.head_dim
            * kv_cache_bytes(settings.kv_cache_dtype, settings.dtype)
        ),
        in_flight_tokens=BATCHES_IN_FLIGHT * settings.max_num_batched_tokens,
    )


def _groups(shape: ModelShape, pipeline_parallel_size: int) -> tuple[PageGroup, ...]:
    """v1/core/kv_cache_utils.py::_get_kv_cache_groups_uniform_page_size of vLLM 0.29."""
    num_layers = max(layers_per_stage(shape.num_layers, pipeline_parallel_size))
    window = shape.window
    num_windowed = num_layers * window.num_layers // shape.num_layers if window else 0
    num_full = num_layers - num_windowed
    if window is None or num_windowed == 0:
        return (PageGroup(num_layers=num_layers, window_tokens=None),)
    if num_full == 0:
        return (PageGroup(num_layers=num_layers, window_tokens=window.tokens),)
    smaller, larger = sorted((num_full, num_windowed))
    size = larger if larger < 1.5 * smaller else smaller
    full = PageGroup(num_layers=size, window_tokens=None)
    windowed = PageGroup(num_layers=size, window_tokens=window.tokens)
    return (full,) * ceil_div(num_full, size) + (windowed,) * ceil_div(num_windowed, size)
