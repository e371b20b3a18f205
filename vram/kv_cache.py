"""Tokens to bytes and back, in the pages of an engine's KV cache. Knows no budget."""

from collections import Counter
from dataclasses import dataclass, replace

from vram.dtypes import (
    SCALE_BYTES_PER_TOKEN_AND_HEAD,
    WITH_A_SCALE_PER_TOKEN_AND_HEAD,
    dtype_bytes,
    kv_cache_bytes,
)
from vram.gpu import Device
from vram.model import ModelShape
from vram.parts import Cache, CrossKeysAndValues, KeysAndValues, Latent, State
from vram.settings import EngineSettings
from vram.units import ceil_div, round_up
from vram.weights import Stage, stages

# Tokens of one page. vLLM: 16 on CUDA (config/cache.py), 128 on the CPU (platforms/cpu.py);
# TensorRT-LLM: tokens_per_block 32. Transformers and SGLang keep single tokens.
PAGE_TOKENS = {
    ("vllm", "cuda"): 16,
    ("vllm", "cpu"): 128,
    ("fake", "cuda"): 16,
    ("fake", "cpu"): 128,
    ("tensorrt_llm", "cuda"): 32,
}
ENGINES_WITH_ONE_POOL = ("vllm", "fake")

# vLLM schedules one batch while another runs (config/vllm.py::max_concurrent_batches), and a
# windowed layer keeps the tokens of both.
BATCHES_BESIDE_THE_PIPELINE = 1

# States that one sequence holds: its own, and with prefix caching that of the page before
# (kv_cache_interface.py::MambaSpec, mamba_cache_mode "align").
STATES = 1
STATES_WITH_PREFIXES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PageGroup:
    """Layers that share one block table: all full, all with the same window, all states."""

    page_bytes: int  # of all its layers; vLLM pads the last group of a kind to the others
    window_tokens: int | None = None
    fixed_pages: int | None = None  # of a sequence, however long it is
    fixed_tokens: int | None = None  # of an encoder's output


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """How one GPU pages the cache of one model; no groups where nothing is cached."""

    groups: tuple[PageGroup, ...]
    page_tokens: int
    token_bytes: int  # of one token in all layers, while every layer still sees it
    in_flight_tokens: int
    pooled: bool  # every group takes its pages from one pool of equal ones

    def sequence_bytes(self, context_tokens: int) -> int:
        """What one sequence of this length takes at most, in whole pages."""
        return sum(group.page_bytes * self._pages(group, context_tokens) for group in self.groups)

    def tokens(self, cache_bytes: int, context_tokens: int) -> int:
        """Tokens that fit when every sequence is this long: vLLM's "GPU KV cache size"."""
        if not self.groups:
            return 0
        if not self.pooled:
            return max(cache_bytes, 0) * context_tokens // self.sequence_bytes(context_tokens)
        pages = sum(self._pages(group, context_tokens) for group in self.groups)
        return self.num_pages(cache_bytes) * context_tokens // pages

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

    def num_pages(self, cache_bytes: int) -> int:
        return max(cache_bytes, 0) // self.groups[0].page_bytes if self.groups else 0

    def states_bytes(self, sequences: int) -> int:
        """What a block for the state of each sequence takes; 0 for a model without states."""
        return sequences * self.groups[0].page_bytes if self.pooled and self.has_states else 0

    @property
    def has_states(self) -> bool:
        return any(group.fixed_pages is not None for group in self.groups)

    def _pages(self, group: PageGroup, context_tokens: int) -> int:
        if group.fixed_pages is not None:
            return group.fixed_pages
        if group.fixed_tokens is not None:
            return ceil_div(group.fixed_tokens, self.page_tokens)
        if group.window_tokens is None:
            return ceil_div(context_tokens, self.page_tokens)
        # v1/kv_cache_interface.py::SlidingWindowSpec of vLLM; one page more because the window
        # need not begin where a page does.
        kept = min(group.window_tokens - 1 + self.in_flight_tokens, context_tokens)
        return ceil_div(kept, self.page_tokens) + 1


def cache_layout(
    shape: ModelShape,
    settings: EngineSettings,
    device: Device,
    engine: str,
    draft: ModelShape | None = None,
) -> CacheLayout:
    """The pages of this model on the GPU that caches the most."""
    sizes = _Sizes(settings, shape)
    page_tokens = PAGE_TOKENS.get((engine, device.kind), 1)
    layouts = []
    for stage in stages(shape, settings.pipeline_parallel_size):
        caches = _caches(shape, stage)
        if draft is not None and stage.is_last:
            caches += _caches(draft, stages(draft, 1)[0])
        pooled = engine in ENGINES_WITH_ONE_POOL
        layouts.append(_stage_layout(caches, settings, sizes, page_tokens, pooled=pooled))
    return max(layouts, key=lambda layout: layout.sequence_bytes(settings.max_model_len))


def _caches(shape: ModelShape, stage: Stage) -> Counter[Cache]:
    """What the layers of a stage keep, and how many keep the same; encoders keep nothing."""
    counted: Counter[Cache] = Counter()
    for kind, number in Counter(stage.layers).items():
        for cache in shape.kinds[kind].caches:
            counted[cache] += number
    return counted


def _stage_layout(
    caches: Counter[Cache],
    settings: EngineSettings,
    sizes: "_Sizes",
    page_tokens: int,
    *,
    pooled: bool,
) -> CacheLayout:
    if pooled and any(isinstance(cache, State) for cache in caches):
        page_tokens = _page_tokens_beside_states(caches, sizes, page_tokens, settings)
    groups = _groups(caches, settings, sizes, page_tokens, pooled=pooled) if caches else ()
    return CacheLayout(
        groups=groups,
        page_tokens=page_tokens,
        token_bytes=sum(
            number * sizes.of_token(cache)
            for cache, number in caches.items()
            if isinstance(cache, (KeysAndValues, Latent))
        ),
        in_flight_tokens=settings.max_num_batched_tokens
        * (settings.pipeline_parallel_size + BATCHES_BESIDE_THE_PIPELINE),
        pooled=pooled,
    )


class _Sizes:
    """Bytes of what a layer keeps, in the cache's own formats, on one GPU."""

    def __init__(self, settings: EngineSettings, shape: ModelShape) -> None:
        self._degree = settings.tensor_parallel_size
        name = settings.kv_cache_dtype
        if name == "auto" and shape.kv_cache_dtype is not None:
            name = shape.kv_cache_dtype  # the checkpoint brings scales for it
        self._element_bytes = kv_cache_bytes(name, settings.dtype)
        self._scaled = name in WITH_A_SCALE_PER_TOKEN_AND_HEAD
        self._model_bytes = dtype_bytes(settings.dtype)

    def of_token(self, cache: KeysAndValues | Latent | CrossKeysAndValues) -> int:
        token_bytes = cache.elements(self._degree) * self._element_bytes
        if self._scaled:
            kv_heads = 1 if isinstance(cache, Latent) else ceil_div(cache.num_heads, self._degree)
            token_bytes += 2 * kv_heads * SCALE_BYTES_PER_TOKEN_AND_HEAD
        return token_bytes

    def of_state(self, state: State) -> int:
        recurrent_bytes = 4 if state.is_float32 else self._model_bytes
        return (
            state.convolution_elements(self._degree) * self._model_bytes
            + state.recurrent_elements(self._degree) * recurrent_bytes
        )

    def of_page(self, cache: Cache, page_tokens: int) -> int:
        if isinstance(cache, State):
            return self.of_state(cache)
        return page_tokens * self.of_token(cache)


def _page_tokens_beside_states(
    caches: Counter[Cache], sizes: _Sizes, page_tokens: int, settings: EngineSettings
) -> int:
    """Pages of attention grow until a state fits into one (platforms/interface.py of vLLM)."""
    growing = [cache for cache in caches if not isinstance(cache, State)]
    if not growing:
        return settings.max_model_len  # one state is the whole sequence
    state_bytes = max(sizes.of_state(cache) for cache in caches if isinstance(cache, State))
    token_bytes = min(
        sizes.of_token(cache) for cache in growing if not isinstance(cache, CrossKeysAndValues)
    )
    return max(page_tokens, round_up(ceil_div(state_bytes, token_bytes), page_tokens))


def _groups(
    caches: Counter[Cache],
    settings: EngineSettings,
    sizes: "_Sizes",
    page_tokens: int,
    *,
    pooled: bool,
) -> tuple[PageGroup, ...]:
    """v1/core/kv_cache_utils.py::_get_kv_cache_groups_uniform_page_size of vLLM."""
    grows = any(not isinstance(cache, State) for cache in caches)
    layers: Counter[PageGroup] = Counter()
    kind_bytes: Counter[PageGroup] = Counter()
    for cache, number in caches.items():
        kind = _kind(cache, settings, grows=grows)
        layers[kind] += number
        kind_bytes[kind] += number * sizes.of_page(cache, page_tokens)
    if not pooled or len(layers) == 1:
        # Layers that differ only in size lie side by side in one block.
        found = [replace(kind, page_bytes=kind_bytes[kind]) for kind in layers]
    else:
        smallest, largest = min(layers.values()), max(layers.values())
        size = largest if largest < 1.5 * smallest else smallest
        page_bytes = size * max(sizes.of_page(cache, page_tokens) for cache in caches)
        found = [
            replace(kind, page_bytes=page_bytes)
            for kind, number in layers.items()
            for _ in range(ceil_div(number, size))
        ]
    # Full attention first: a page of it is what people count in.
    found.sort(key=lambda group: (group.fixed_pages or 0, group.window_tokens or 0))
    return tuple(found)


def _kind(cache: Cache, settings: EngineSettings, *, grows: bool) -> PageGroup:
    if isinstance(cache, State):
        # Without attention there is nothing whose prefix could be cached.
        states = STATES_WITH_PREFIXES if settings.enable_prefix_caching and grows else STATES
        return PageGroup(page_bytes=0, fixed_pages=states + settings.num_speculative_tokens)
    if isinstance(cache, CrossKeysAndValues):
        return PageGroup(page_bytes=0, fixed_tokens=cache.encoder_tokens)
    window = cache.window_tokens if isinstance(cache, KeysAndValues) else None
    return PageGroup(page_bytes=0, window_tokens=window)
