"""Chooses every engine setting for a model on one kind of device. Places nothing."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vram import defaults
from vram.budget import HIGHEST_SHARE, longest_context, within
from vram.check import check
from vram.concurrency import (
    COMFORTABLE_CONTEXT_TOKENS,
    FEWEST_SEQUENCES,
    check_wishes,
    request_tokens,
    too_many_at_once,
    wished_cache_bytes,
)
from vram.errors import DoesNotFit, Invalid
from vram.estimate import Estimate, estimate
from vram.gpu import Device
from vram.model import ModelShape
from vram.remedy import SMALLEST_BATCH_TOKENS, refusal
from vram.settings import EngineSettings
from vram.units import gib
from vram.wishes import Wishes

__all__ = ["Plan", "Wishes", "fitting_plan", "is_comfortable", "plan", "why_not"]

SHORTEST_CONTEXT_TOKENS = 1024
ENOUGH_SEQUENCES = 128
# No use in more sequences at once than the cache holds at this length.
SHORT_SEQUENCE_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Settings that fit, what they hold, and why they are what they are."""

    settings: EngineSettings
    estimate: Estimate
    device: Device
    engine: str
    gpu_fraction: float
    notes: tuple[str, ...]


def plan(
    shape: ModelShape, wishes: Wishes, device: Device, engine: str = "vllm", name: str = ""
) -> Plan:
    """The smallest split and the largest settings inside the budget, or DoesNotFit."""
    found = fitting_plan(shape, wishes, device, engine)
    if found is None:
        raise why_not(shape, wishes, device, engine, name)
    return found


def fitting_plan(
    shape: ModelShape, wishes: Wishes, device: Device, engine: str = "vllm"
) -> Plan | None:
    """As `plan`, without the search for what would fit instead; None when nothing does."""
    gpu_fraction = _gpu_fraction(wishes, device)
    check_wishes(shape, wishes)
    limit_bytes = int(device.total_bytes * gpu_fraction)
    fallback: EngineSettings | None = None
    smallest: EngineSettings | None = None
    for degrees in _splits(shape, wishes):
        wanted = _wanted(shape, wishes, device, engine, degrees)
        smallest = smallest or wanted
        found = _largest(shape, wanted, wishes, device, engine, limit_bytes)
        if found is None:
            continue
        if is_comfortable(shape, found, wishes):
            return _finished(shape, wanted, found, wishes, device, engine, gpu_fraction)
        if fallback is None or found.max_model_len > fallback.max_model_len:
            fallback = found
    if fallback is None or smallest is None:
        return None
    return _finished(shape, smallest, fallback, wishes, device, engine, gpu_fraction)


def why_not(
    shape: ModelShape, wishes: Wishes, device: Device, engine: str = "vllm", name: str = ""
) -> DoesNotFit:
    """The refusal of wishes that do not fit: asked, needed, available, what would fit."""
    label = name or shape.architecture
    limit_bytes = int(device.total_bytes * _gpu_fraction(wishes, device))
    smallest = _wanted(shape, wishes, device, engine, next(_splits(shape, wishes)))
    if wishes.max_model_len is None and (wishes.context or wishes.concurrency):
        tokens = min(request_tokens(wishes), shape.max_context_tokens)
        smallest = replace(smallest, max_model_len=tokens)
    small_batch = defaults.coupled(list(_batches(smallest, wishes))[-1], wishes, engine)
    too_many = too_many_at_once(label, shape, small_batch, wishes, device, engine, limit_bytes)
    return too_many or refusal(label, shape, smallest, device, engine, limit_bytes)


def is_comfortable(shape: ModelShape, settings: EngineSettings, wishes: Wishes) -> bool:
    """Whether the context is what was asked for, or long enough where nobody asked."""
    asked = wishes.context or wishes.max_model_len
    return settings.max_model_len >= min(
        asked or COMFORTABLE_CONTEXT_TOKENS, shape.max_context_tokens
    )


def _wanted(
    shape: ModelShape, wishes: Wishes, device: Device, engine: str, degrees: tuple[int, int]
) -> EngineSettings:
    wanted = defaults.settings_for(shape, wishes, device, engine, *degrees)
    check(shape, wanted, device, engine)
    return wanted


def _gpu_fraction(wishes: Wishes, device: Device) -> float:
    fraction = 1.0 if wishes.gpu_fraction is None else wishes.gpu_fraction
    if not (math.isfinite(fraction) and 0 < fraction <= 1):
        raise Invalid(f"gpu_fraction is {fraction}; it is above 0 and at most 1", "gpu_fraction")
    if fraction < 1 and device.kind == "cpu":
        raise Invalid("gpu_fraction is for cards; on the CPU, give fewer bytes", "gpu_fraction")
    if (
        fraction < 1
        and (wishes.tensor_parallel_size or 1) * (wishes.pipeline_parallel_size or 1) > 1
    ):
        raise Invalid(
            "gpu_fraction below 1 and a model over several GPUs exclude each other: "
            "two of its parts could land on one card",
            "gpu_fraction",
        )
    return fraction


def _splits(shape: ModelShape, wishes: Wishes) -> Iterator[tuple[int, int]]:
    """Tensor x pipeline degrees to try, the fewest GPUs first."""
    pipeline = wishes.pipeline_parallel_size or 1
    if wishes.tensor_parallel_size is not None:
        yield wishes.tensor_parallel_size, pipeline
        return
    yield 1, pipeline
    if wishes.gpu_fraction is not None and wishes.gpu_fraction < 1:
        return
    degree = 2
    while degree * pipeline <= wishes.max_gpus:
        if not shape.split_problem(degree):
            yield degree, pipeline
        degree *= 2


def _largest(
    shape: ModelShape,
    wanted: EngineSettings,
    wishes: Wishes,
    device: Device,
    engine: str,
    limit_bytes: int,
) -> EngineSettings | None:
    """The wanted context if a smaller batch makes room for it, else the longest context."""

    def fitted(settings: EngineSettings) -> EngineSettings | None:
        settings = defaults.coupled(settings, wishes, engine)
        cache_bytes = wished_cache_bytes(shape, settings, wishes, device, engine)
        found = within(shape, settings, device, engine, limit_bytes, cache_bytes)
        if found is None or _moves_a_pin(found, wishes):
            return None
        return found

    candidates = list(_batches(wanted, wishes))
    for candidate in candidates:
        found = fitted(candidate)
        if found is not None:
            return found
    if wishes.max_model_len is not None:
        return None
    shortest = wishes.context or min(SHORTEST_CONTEXT_TOKENS, wanted.max_model_len)
    # Fewer sequences hardly make room, so a shorter context comes before them.
    small_batches = [
        c for c in candidates if c.max_num_seqs >= min(ENOUGH_SEQUENCES, wanted.max_num_seqs)
    ]
    return longest_context(small_batches[-1], fitted, shortest) or longest_context(
        candidates[-1], fitted, shortest
    )


def _moves_a_pin(found: EngineSettings, wishes: Wishes) -> bool:
    return wishes.gpu_memory_utilization not in (
        None,
        found.gpu_memory_utilization,
    ) or wishes.kv_cache_memory_bytes not in (None, found.kv_cache_memory_bytes)


def _batches(wanted: EngineSettings, wishes: Wishes) -> Iterator[EngineSettings]:
    """The wanted batch, then halves of what is not pinned."""
    settings = wanted
    yield settings
    tokens, sequences = settings.max_num_batched_tokens, settings.max_num_seqs
    smallest = max(SMALLEST_BATCH_TOKENS, wishes.concurrency or 0, wishes.max_num_seqs or 0)
    while wishes.max_num_batched_tokens is None and tokens > smallest:
        tokens = max(tokens // 2, smallest)
        if wishes.max_num_seqs is None:
            sequences = min(sequences, tokens)
        settings = replace(settings, max_num_batched_tokens=tokens, max_num_seqs=sequences)
        yield settings
    fewest = max(FEWEST_SEQUENCES, wishes.concurrency or 0)
    while wishes.max_num_seqs is None and sequences > fewest:
        sequences = max(sequences // 2, fewest)
        settings = replace(settings, max_num_seqs=sequences)
        yield settings


def _finished(
    shape: ModelShape,
    wanted: EngineSettings,
    found: EngineSettings,
    wishes: Wishes,
    device: Device,
    engine: str,
    gpu_fraction: float,
) -> Plan:
    """Caps what the cache cannot use, fills in bytes on the CPU, and says what was decided."""
    settings = found
    if wishes.max_num_seqs is None:
        # Fewer may profile a smaller peak, and the cache that takes its place is not given back.
        fewer = _with_useful_sequences(shape, settings, wishes, device, engine)
        under_load_bytes = estimate(shape, fewer, device, engine).device_use_under_load_bytes
        if under_load_bytes <= device.total_bytes * gpu_fraction:
            settings = fewer
    if device.kind == "cpu" and settings.kv_cache_memory_bytes is None:
        settings = _with_cache_bytes(shape, settings, device, engine)
    estimated = estimate(shape, settings, device, engine)
    assert estimated.fits, estimated.reason
    return Plan(
        settings=settings,
        estimate=estimated,
        device=device,
        engine=engine,
        gpu_fraction=gpu_fraction,
        notes=tuple(_notes(shape, wanted, settings, estimated)),
    )


def _with_useful_sequences(
    shape: ModelShape, settings: EngineSettings, wishes: Wishes, device: Device, engine: str
) -> EngineSettings:
    cache_tokens = estimate(shape, settings, device, engine).kv_cache_tokens
    useful = cache_tokens // min(SHORT_SEQUENCE_TOKENS, settings.max_model_len)
    useful = max(1, useful, wishes.concurrency or 0)
    return replace(settings, max_num_seqs=min(settings.max_num_seqs, useful))


def _with_cache_bytes(
    shape: ModelShape, settings: EngineSettings, device: Device, engine: str
) -> EngineSettings:
    """vLLM on the CPU takes bytes, and RAM beyond what its sequences can fill is wasted."""
    estimated = estimate(shape, settings, device, engine)
    cache_bytes = min(settings.max_num_seqs * estimated.sequence_bytes, estimated.cache_left_bytes)
    return replace(settings, kv_cache_memory_bytes=cache_bytes)


def _notes(
    shape: ModelShape, wanted: EngineSettings, settings: EngineSettings, estimated: Estimate
) -> Iterator[str]:
    if settings.dtype != shape.dtype:
        yield f"dtype {settings.dtype} instead of the checkpoint's {shape.dtype}."
    if settings.tensor_parallel_size != wanted.tensor_parallel_size:
        yield f"tensor_parallel_size {settings.tensor_parallel_size}: it is too big for fewer GPUs."
    for setting in ("max_model_len", "max_num_batched_tokens", "max_num_seqs"):
        before, after = getattr(wanted, setting), getattr(settings, setting)
        if after != before:
            yield f"{setting} {before} → {after}: more does not fit or cannot be used."
    before_share, share = wanted.gpu_memory_utilization, settings.gpu_memory_utilization
    if share < before_share:
        yield (
            f"gpu_memory_utilization {before_share:.2f} → {share:.2f}: under load the device "
            f"holds {gib(estimated.device_use_under_load_bytes)}."
        )
    elif share > before_share:
        yield (
            f"gpu_memory_utilization {before_share:.2f} → {share:.2f} (at most {HIGHEST_SHARE}): "
            "one sequence needs it."
        )
