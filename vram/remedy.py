"""What would make a refused model fit: each suggestion is tried with the estimator first."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from vram.budget import longest_context, within
from vram.errors import DoesNotFit, Invalid
from vram.estimate import Estimate, estimate
from vram.gpu import Device
from vram.model import ModelShape
from vram.settings import EngineSettings
from vram.units import GIB

SMALLEST_BATCH_TOKENS = 2048
SHORTEST_USEFUL_CONTEXT_TOKENS = 512
DEGREES_TO_TRY = (2, 4, 8, 16)
SUGGESTIONS = 3

Fitted = Callable[[EngineSettings], EngineSettings | None]


def refusal(
    label: str,
    shape: ModelShape,
    settings: EngineSettings,
    device: Device,
    engine: str,
    limit_bytes: int,
) -> DoesNotFit:
    """The error for settings that do not fit in `limit_bytes` of the device."""
    needed_bytes, available_bytes = shortage(
        settings, estimate(shape, settings, device, engine), limit_bytes
    )

    def fitted(changed: EngineSettings) -> EngineSettings | None:
        return within(shape, changed, device, engine, limit_bytes)

    found = list(_remedies(shape, settings, device, engine, fitted))[:SUGGESTIONS]
    return DoesNotFit(
        f"{label} at {settings.max_model_len} tokens on {describe(device, settings.num_gpus)}",
        needed_bytes,
        available_bytes,
        f"It fits {', or '.join(text for text, _ in found)}."
        if found
        else "No setting makes it fit here; take a larger device or a smaller model.",
        found[0][1] if found else "model",
    )


def describe(device: Device, num_gpus: int = 1) -> str:
    """The device with its article, for a sentence."""
    if device.kind == "cpu":
        return "the CPU"
    if num_gpus > 1:
        return f"each of {num_gpus} {device.name}"
    return f"{'an' if device.name[0] in 'AHLR' else 'a'} {device.name}"


def shortage(settings: EngineSettings, estimated: Estimate, limit_bytes: int) -> tuple[int, int]:
    """Needed and available bytes: of the device, or of the share that the settings give."""
    if estimated.needed_bytes > limit_bytes:
        return estimated.needed_bytes, limit_bytes
    cache_bytes = estimated.item("kv_cache").bytes
    if cache_bytes >= estimated.sequence_bytes:
        return estimated.device_use_under_load_bytes, limit_bytes
    if settings.kv_cache_memory_bytes is not None:
        return estimated.fixed_bytes + estimated.sequence_bytes, estimated.total_bytes
    counted_bytes = estimated.budget_bytes - estimated.cache_left_bytes
    return counted_bytes + estimated.sequence_bytes, estimated.budget_bytes


def _remedies(
    shape: ModelShape, settings: EngineSettings, device: Device, engine: str, fitted: Fitted
) -> Iterator[tuple[str, str]]:
    """Sentences with the setting to turn, the gentlest first."""
    same = fitted(settings)
    if same is not None and settings.kv_cache_memory_bytes is not None:
        yield f"with {same.kv_cache_memory_bytes} bytes of KV cache", "kv_cache_memory_bytes"
    elif same is not None:
        share = f"{same.gpu_memory_utilization:.2f}"
        yield f"at gpu_memory_utilization {share}", "gpu_memory_utilization"
    else:
        shorter = longest_context(settings, fitted, SHORTEST_USEFUL_CONTEXT_TOKENS)
        if shorter is not None:
            yield f"at {shorter.max_model_len} tokens", "max_model_len"
    if _smaller_batch_fits(settings, fitted):
        yield f"with {SMALLEST_BATCH_TOKENS} batched tokens", "max_num_batched_tokens"
    if device.kind == "cpu":
        yield f"in {_enough_ram_gib(shape, settings, device, engine)} GiB of RAM", "memory"
        return
    degree = _larger_degree(settings, fitted)
    if degree is not None:
        gpus = degree * settings.pipeline_parallel_size
        yield f"on {gpus} GPUs", "tensor_parallel_size"
    plain = shape.quantization is None and settings.quantization is None
    # Below Ampere no engine of ours computes with fp8 weights.
    if plain and device.bfloat16 and fitted(replace(settings, quantization="fp8")) is not None:
        yield "with fp8 weights", "quantization"


def _smaller_batch_fits(settings: EngineSettings, fitted: Fitted) -> bool:
    if settings.max_num_batched_tokens <= SMALLEST_BATCH_TOKENS:
        return False
    smaller = replace(
        settings,
        max_num_batched_tokens=SMALLEST_BATCH_TOKENS,
        max_num_seqs=min(settings.max_num_seqs, SMALLEST_BATCH_TOKENS),
    )
    return fitted(smaller) is not None


def _enough_ram_gib(
    shape: ModelShape, settings: EngineSettings, device: Device, engine: str
) -> float:
    """Tenths of a GiB that would hold one sequence at the usual share."""
    needed_bytes = estimate(shape, settings, device, engine).needed_bytes
    return math.ceil(needed_bytes / settings.gpu_memory_utilization / GIB * 10) / 10


def _larger_degree(settings: EngineSettings, fitted: Fitted) -> int | None:
    for degree in DEGREES_TO_TRY:
        if degree <= settings.tensor_parallel_size:
            continue
        try:
            if fitted(replace(settings, tensor_parallel_size=degree)) is not None:
                return degree
        except Invalid:
            continue  # this degree does not divide the heads
    return None
