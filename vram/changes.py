"""One change to settings at a time, the gentlest first. Each makes one item of memory smaller.

Only the share and the cache can also grow, inside what the model may have. Undoing a change is
going on from the settings before it: every change is a new value.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from vram.case import Case
from vram.dtypes import kv_cache_bytes
from vram.engines import FILL_THEIR_BUDGET
from vram.floor import (
    SHARE_STEPS,
    TOLERANCE,
    estimated,
    free_limit_bytes,
    hidden_bytes,
    with_room,
)
from vram.graphs import largest_capture
from vram.overhead import compiles
from vram.settings import EngineSettings
from vram.shortage import ShortageKind

# Below it a batch is mostly overhead, and hardly smaller.
FEWEST_BATCHED_TOKENS = 256
SMALLEST_CAPTURE = 8
# Of the free memory that one start saw, the next one may miss this part of the device.
FREE_SHARE_LESS = 0.002

_TOO_LITTLE_CACHE = frozenset({ShortageKind.NO_CACHE_BLOCKS, ShortageKind.CONTEXT_TOO_LONG})
_TOO_MUCH_CACHE = frozenset(
    {
        ShortageKind.NOT_FREE,
        ShortageKind.CACHE_ALLOCATION,
        ShortageKind.GRAPH_CAPTURE,
        ShortageKind.WARM_UP,
        ShortageKind.RUN_TIME,
        ShortageKind.OUTSIDE_ALLOCATOR,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Other settings, and a name for what is other about them."""

    name: str
    settings: EngineSettings
    # What the estimate is asked: nothing where the engine's own error names the value, and only for
    # the cache where the error says what the device lacked.
    check: Literal["device", "cache", "nothing"] = "device"


def smaller_cache(case: Case, settings: EngineSettings, less_bytes: int) -> Iterator[Change]:
    """So many bytes less; where that was too little before, half of the way to it."""
    name = "smaller KV cache"
    cache_bytes = settings.kv_cache_memory_bytes
    if cache_bytes is not None:
        low = max(_cache_bytes_that_died(case, settings, _TOO_LITTLE_CACHE), default=0)
        wanted = _or_midway(cache_bytes - less_bytes, low, cache_bytes)
        if wanted < cache_bytes:
            smaller = replace(settings, kv_cache_memory_bytes=wanted)
            yield Change(name=name, settings=smaller, check="cache")
    elif case.model.engine in FILL_THEIR_BUDGET:
        # Not bytes: how many the dead engine had is only estimated, and more would be worse.
        now = round(settings.gpu_memory_utilization * SHARE_STEPS)
        less = math.ceil(less_bytes / case.model.device.total_bytes * SHARE_STEPS)
        found = estimated(case, settings)
        counted_bytes = (found.budget_bytes - found.cache_left_bytes) * (1 - TOLERANCE)
        counted = int(counted_bytes / case.model.device.total_bytes * SHARE_STEPS)
        low = max([counted, *_shares_that_died(case, settings, _TOO_LITTLE_CACHE)])
        wanted = _or_midway(now - less, low, now)
        if wanted < now:
            smaller = replace(settings, gpu_memory_utilization=wanted / SHARE_STEPS)
            yield Change(name=name, settings=smaller, check="cache")


def larger_cache(case: Case, settings: EngineSettings) -> Iterator[Change]:
    """First what one sequence should need, then all that the model may have."""
    found = estimated(case, settings)
    cache_bytes = settings.kv_cache_memory_bytes
    if cache_bytes is not None:
        if cache_bytes < found.sequence_bytes:
            enough = replace(settings, kv_cache_memory_bytes=found.sequence_bytes)
            yield Change(name="larger KV cache", settings=enough)
        return
    if case.model.engine not in FILL_THEIR_BUDGET:
        return
    device = case.model.device
    now = round(settings.gpu_memory_utilization * SHARE_STEPS)
    highest = min(case.highest_share, free_limit_bytes(case) / device.total_bytes)
    top = int(highest * SHARE_STEPS + 1e-6)
    too_high = min(_shares_that_died(case, settings, _TOO_MUCH_CACHE), default=None)
    if too_high is not None and too_high <= top:
        top = (now + too_high) // 2
    counted_bytes = found.budget_bytes - found.cache_left_bytes + hidden_bytes(case)
    enough_bytes = counted_bytes + found.sequence_bytes
    enough_share = math.ceil(enough_bytes / device.total_bytes * SHARE_STEPS) + 5
    for share in (enough_share, top):
        if now < share <= top:
            larger = replace(settings, gpu_memory_utilization=share / SHARE_STEPS)
            for change in in_the_room(case, Change(name="larger share", settings=larger)):
                if change.settings.gpu_memory_utilization > settings.gpu_memory_utilization:
                    yield change


def cache_in_bytes(case: Case, settings: EngineSettings) -> Iterator[Change]:
    """As many as the share should leave, less what the estimate may be wrong by."""
    found = estimated(case, settings)
    safe_bytes = int(TOLERANCE * found.fixed_bytes) + max(hidden_bytes(case), 0)
    cache_bytes = found.cache_left_bytes - safe_bytes
    if cache_bytes >= found.sequence_bytes > 0:
        changed = replace(settings, kv_cache_memory_bytes=cache_bytes)
        yield Change(name="KV cache in bytes", settings=changed)


def in_the_room(case: Case, change: Change) -> Iterator[Change]:
    """With as much cache as the device should have room for, then as it could have."""
    for optimistic in (False, True):
        fitted = with_room(case, change.settings, optimistic=optimistic)
        if fitted is not None:
            yield replace(change, settings=fitted)


def share_of_free(case: Case, settings: EngineSettings, free_bytes: int) -> EngineSettings:
    """With a share, and cache bytes, that are free."""
    total_bytes = case.model.device.total_bytes
    share = int((free_bytes / total_bytes - FREE_SHARE_LESS) * SHARE_STEPS) / SHARE_STEPS
    share = max(min(share, settings.gpu_memory_utilization), 1 / SHARE_STEPS)
    changed = replace(settings, gpu_memory_utilization=share)
    if settings.kv_cache_memory_bytes is None:
        return changed
    found = estimated(case, settings)
    others_bytes = found.device_use_under_load_bytes - settings.kv_cache_memory_bytes
    room_bytes = free_bytes - others_bytes - max(hidden_bytes(case), 0)
    cache_bytes = max(min(settings.kv_cache_memory_bytes, room_bytes), 1)
    return replace(changed, kv_cache_memory_bytes=cache_bytes)


def fewer_tokens(case: Case, settings: EngineSettings) -> Iterator[Change]:
    """Halves of the batch. Transformers reads a prompt in one piece: its batch is its context."""
    if case.model.engine == "transformers":
        return
    for tokens in _halves(settings.max_num_batched_tokens, FEWEST_BATCHED_TOKENS):
        sequences = min(settings.max_num_seqs, tokens)
        changed = replace(settings, max_num_batched_tokens=tokens, max_num_seqs=sequences)
        yield Change(name="fewer batched tokens", settings=changed)


def fewer_sequences(case: Case, settings: EngineSettings) -> Iterator[Change]:
    for sequences in _halves(settings.max_num_seqs, 1):
        yield Change(name="fewer sequences", settings=replace(settings, max_num_seqs=sequences))


def fewer_graphs(case: Case, settings: EngineSettings) -> Iterator[Change]:
    """Smaller captures, then none."""
    model = case.model
    if not compiles(settings, model.device, model.engine):
        return
    for size in _halves(largest_capture(model.shape, settings), SMALLEST_CAPTURE):
        changed = replace(settings, max_cudagraph_capture_size=size)
        yield Change(name="fewer CUDA graphs", settings=changed)
    yield Change(name="no CUDA graphs", settings=replace(settings, enforce_eager=True))


def shorter_context(case: Case, settings: EngineSettings, tokens: int | None) -> Iterator[Change]:
    if tokens is not None and tokens < settings.max_model_len:
        changed = replace(settings, max_model_len=max(tokens, 1))
        if case.model.engine == "transformers":  # it reads a prompt in one piece
            batch = min(settings.max_num_batched_tokens, max(2048, changed.max_model_len))
            changed = replace(changed, max_num_batched_tokens=batch)
        yield Change(name="shorter context", settings=changed)


def halved_context(case: Case, settings: EngineSettings) -> Iterator[Change]:
    for tokens in _halves(settings.max_model_len, case.shortest_tokens):
        yield from shorter_context(case, settings, tokens)


def fp8_cache(case: Case, settings: EngineSettings) -> Iterator[Change]:
    """Where the card computes with it and the cache is wider."""
    model = case.model
    written = settings.kv_cache_dtype
    own = model.shape.kv_cache_dtype if written == "auto" else None
    is_wider = kv_cache_bytes(own or written, settings.dtype) > 1
    if is_wider and model.device.float8 and model.engine in FILL_THEIR_BUDGET:
        yield Change(name="fp8 KV cache", settings=replace(settings, kv_cache_dtype="fp8"))


def fp8_weights(case: Case, settings: EngineSettings) -> Iterator[Change]:
    """Made while loading; below Ampere no engine of ours computes with them."""
    model = case.model
    is_plain = model.shape.quantization is None and settings.quantization is None
    if is_plain and model.device.kind == "cuda" and model.device.bfloat16:
        yield Change(name="fp8 weights", settings=replace(settings, quantization="fp8"))


def expandable(case: Case, settings: EngineSettings) -> Iterator[Change]:
    if case.model.device.kind == "cuda" and not settings.expandable_segments:
        changed = replace(settings, expandable_segments=True)
        yield Change(name="expandable segments", settings=changed)


def least(case: Case, settings: EngineSettings) -> Iterator[Change]:
    """Everything as small as it may be; with the share as it is, and with a larger one."""
    tokens = min(settings.max_num_batched_tokens, FEWEST_BATCHED_TOKENS)
    context = min(settings.max_model_len, case.shortest_tokens)
    if case.model.engine == "transformers":
        tokens = min(settings.max_num_batched_tokens, max(2048, context))
    changed = replace(
        settings,
        max_model_len=context,
        max_num_batched_tokens=tokens,
        max_num_seqs=1,
        enforce_eager=True,
    )
    if settings.kv_cache_memory_bytes is not None:
        enough_bytes = estimated(case, changed).sequence_bytes
        cache_bytes = min(settings.kv_cache_memory_bytes, 2 * enough_bytes)
        changed = replace(changed, kv_cache_memory_bytes=max(cache_bytes, 1))
    name = "the least of everything"
    yield Change(name=name, settings=changed)
    for larger in larger_cache(case, changed):
        yield replace(larger, name=name)


def _or_midway(wanted: int, low: int, now: int) -> int:
    """`wanted`, unless that is at or below what is too little: then the middle."""
    return wanted if wanted > low else min((low + now) // 2, now) if low < now - 1 else now


def _halves(size: int, lowest: int) -> Iterator[int]:
    while size > lowest:
        size = max(size // 2, lowest)
        yield size


def _shares_that_died(
    case: Case, settings: EngineSettings, kinds: frozenset[ShortageKind]
) -> list[int]:
    """Thousandths, of settings that differ in nothing else."""
    return [
        round(tried.settings.gpu_memory_utilization * SHARE_STEPS)
        for tried in case.tried
        if tried.shortage is not None
        and tried.shortage.kind in kinds
        and _alike(tried.settings, settings)
    ]


def _cache_bytes_that_died(
    case: Case, settings: EngineSettings, kinds: frozenset[ShortageKind]
) -> list[int]:
    return [
        tried.settings.kv_cache_memory_bytes or 0
        for tried in case.tried
        if tried.shortage is not None
        and tried.shortage.kind in kinds
        and _alike(tried.settings, settings)
    ]


def _alike(one: EngineSettings, other: EngineSettings) -> bool:
    def rest(settings: EngineSettings) -> EngineSettings:
        return replace(settings, gpu_memory_utilization=1.0, kv_cache_memory_bytes=None)

    same_way = (one.kv_cache_memory_bytes is None) == (other.kv_cache_memory_bytes is None)
    return same_way and rest(one) == rest(other)
