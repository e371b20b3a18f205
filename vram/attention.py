"""What attention takes while a step runs, which no engine's profiling sees. FlashAttention 3 only.

A step of many short prompts beside a long context is split along the context, so that it reaches
all multiprocessors, and each split has an output of its own in 32 bits.
"""

from vram.gpu import Device
from vram.model import Block, ModelShape
from vram.overhead import EVIDENCE, Overhead
from vram.parts import KeysAndValues, Latent
from vram.settings import EngineSettings
from vram.units import ceil_div

# vLLM runs FlashAttention 3 on compute capability 9 (fa_utils.py); SXM cards have 132
# multiprocessors. On other cards we know of no such buffer and have measured none.
HOPPER = ("H100", "H200", "GH200")
MULTIPROCESSORS = 132
MOST_SPLITS = 128  # flash_api.cpp, get_num_splits
FEWEST_CONTEXT_BLOCKS = 5  # below: never split (heuristics.h)
ENOUGH_OF_THE_BEST = 0.85  # likewise: the fewest splits that are this efficient
# Query rows of a tile, and tokens of the context in one (tile_size.h). Latent attention runs short
# prompts against one head of the latent's size.
QUERY_ROWS, LATENT_QUERY_ROWS = 128, 64
CONTEXT_TOKENS = 128
ACCUMULATOR_BYTES = 4
# Prompts this short are what splits the most.
SHORT_PROMPT_TOKENS = 32


def split_accumulators(
    shape: ModelShape, settings: EngineSettings, device: Device, engine: str
) -> Overhead:
    """The most that the outputs of the splits take in one step."""
    if not (device.name.startswith(HOPPER) and engine in ("vllm", "fake", "sglang")):
        return Overhead(size_bytes=0, formula="no FlashAttention 3", source="settings")
    size_bytes = max((_block_bytes(kind, settings) for kind in shape.kinds), default=0)
    return Overhead(
        size_bytes=size_bytes,
        formula="splits x batched tokens x query heads x head size x 4 bytes",
        source=f"FlashAttention 3, heuristics.h; {EVIDENCE}",
    )


def num_splits(query_tiles: int, context_blocks: int) -> int:
    """FlashAttention 3's num_splits_heuristic for one sequence (hopper/heuristics.h)."""
    if query_tiles >= 0.8 * MULTIPROCESSORS or context_blocks < FEWEST_CONTEXT_BLOCKS:
        return 1
    most = min(MOST_SPLITS, MULTIPROCESSORS, context_blocks)

    def efficiency(splits: int) -> float:
        waves = query_tiles * splits / MULTIPROCESSORS
        return waves / ceil_div(query_tiles * splits, MULTIPROCESSORS)

    efficiencies = [efficiency(splits) for splits in range(1, most + 1)]
    enough = ENOUGH_OF_THE_BEST * max(efficiencies)
    return next(n for n, found in enumerate(efficiencies, start=1) if found >= enough)


def _block_bytes(kind: Block, settings: EngineSettings) -> int:
    degree = settings.tensor_parallel_size
    tokens = min(settings.max_num_batched_tokens, settings.max_num_seqs * SHORT_PROMPT_TOKENS)
    most = 0
    for cache in kind.caches:
        if isinstance(cache, KeysAndValues):
            kv_heads, tile_rows = ceil_div(cache.num_heads, degree), QUERY_ROWS
        elif isinstance(cache, Latent):
            kv_heads, tile_rows = 1, LATENT_QUERY_ROWS
        else:
            continue
        query_heads = ceil_div(cache.query_heads, degree)
        tiles = ceil_div(ceil_div(query_heads, kv_heads) * SHORT_PROMPT_TOKENS, tile_rows)
        splits = num_splits(kv_heads * tiles, ceil_div(settings.max_model_len, CONTEXT_TOKENS))
        if splits > 1:
            most = max(most, splits * tokens * query_heads * cache.value_size * ACCUMULATOR_BYTES)
    return most
