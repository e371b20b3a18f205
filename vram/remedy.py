"""What would make a refused model fit: each suggestion is tried with the estimator first."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from vram.budget import longest_context, within
from vram.errors import DoesNotFit, Invalid
from vram.estimate import Estimate, estimate
from vram.gpu import Device
from vram.model import ModelShape
from vram.settings import EngineSettings
from vram.units import GIB

SMALLEST_BATCH_TOKENS = 2048
SHORTEST_USEFUL_CONTEXT_TOKENS = 512
FEWEST_SEQUENCES = 16
DEGREES_TO_TRY = (2, 4, 8, 16)
SUGGESTIONS = 4
MOVE_ALONG = ("gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One setting to turn, and the value with which the model fits."""

    setting: str
    value: int | float | str
    num_gpus: int = 1
    # The share or the cache's bytes, where they have to move with it: our pre-check does that
    # before each load, other people by hand.
    also: tuple[tuple[str, int | float], ...] = ()

    def __str__(self) -> str:
        match self.setting:
            case "kv_cache_memory_bytes":
                return f"with {self.value} bytes of KV cache"
            case "gpu_memory_utilization":
                return f"at gpu_memory_utilization {self.value:.2f}"
            case "max_model_len":
                return f"at {self.value} tokens"
            case "max_num_batched_tokens":
                return f"with {self.value} batched tokens"
            case "max_num_seqs":
                return f"with {self.value} sequences at once"
            case "memory":
                return f"in {self.value} GiB of RAM"
            case "tensor_parallel_size":
                return f"on {self.num_gpus} GPUs"
            case _:
                return f"with {self.value} weights"


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

    found = remedies(shape, settings, device, engine, limit_bytes)
    return DoesNotFit(
        f"{label} at {settings.max_model_len} tokens on {describe(device, settings.num_gpus)}",
        needed_bytes,
        available_bytes,
        f"It fits {', or '.join(map(str, found))}."
        if found
        else "No setting makes it fit here; take a larger device or a smaller model.",
        found[0].setting if found else "model",
    )


def remedies(
    shape: ModelShape, settings: EngineSettings, device: Device, engine: str, limit_bytes: int
) -> tuple[Remedy, ...]:
    """What would fit, the gentlest first; each was tried."""

    attempt = _Attempt(shape, settings, device, engine, limit_bytes)
    return tuple(islice(_remedies(attempt), SUGGESTIONS))


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
    if cache_bytes >= estimated.least_cache_bytes:
        return estimated.device_use_under_load_bytes, limit_bytes
    if settings.kv_cache_memory_bytes is not None:
        return estimated.fixed_bytes + estimated.least_cache_bytes, estimated.total_bytes
    counted_bytes = estimated.budget_bytes - estimated.cache_left_bytes
    return counted_bytes + estimated.least_cache_bytes, estimated.budget_bytes


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What does not fit, and where."""

    shape: ModelShape
    settings: EngineSettings
    device: Device
    engine: str
    limit_bytes: int
    share_suffices: bool = False  # then nothing else is worth a turn of the share besides

    def fitted(self, changed: EngineSettings) -> EngineSettings | None:
        """With a share, or cache bytes, that fits."""
        return within(self.shape, changed, self.device, self.engine, self.limit_bytes)

    def kept(self, changed: EngineSettings) -> EngineSettings | None:
        """As it is."""
        found = estimate(self.shape, changed, self.device, self.engine)
        fits = found.fits and found.device_use_under_load_bytes <= self.limit_bytes
        return changed if fits else None

    def tried(self, changed: EngineSettings) -> EngineSettings | None:
        """One turn is better than two."""
        return self.kept(changed) or (None if self.share_suffices else self.fitted(changed))

    def remedy(self, setting: str, found: EngineSettings, num_gpus: int = 1) -> Remedy:
        also = (
            (name, getattr(found, name))
            for name in MOVE_ALONG
            if name != setting and getattr(found, name) != getattr(self.settings, name)
        )
        return Remedy(
            setting=setting, value=getattr(found, setting), num_gpus=num_gpus, also=tuple(also)
        )


def _remedies(attempt: _Attempt) -> Iterator[Remedy]:
    settings = attempt.settings
    same = attempt.fitted(settings)
    if same is not None:
        pinned = same.kv_cache_memory_bytes is not None
        yield attempt.remedy("kv_cache_memory_bytes" if pinned else "gpu_memory_utilization", same)
        attempt = replace(attempt, share_suffices=True)
    shorter = longest_context(settings, attempt.kept, SHORTEST_USEFUL_CONTEXT_TOKENS)
    if shorter is None and same is None:
        shorter = longest_context(settings, attempt.fitted, SHORTEST_USEFUL_CONTEXT_TOKENS)
    if shorter is not None:
        yield attempt.remedy("max_model_len", shorter)
    for setting, found in (
        ("max_num_batched_tokens", _smaller_batch(attempt)),
        ("max_num_seqs", _fewer_sequences(attempt) if same is None else None),
    ):
        if found is not None:
            yield attempt.remedy(setting, found)
    if attempt.device.kind == "cpu":
        yield Remedy(setting="memory", value=_enough_ram_gib(attempt))
        return
    wider = _larger_degree(attempt)
    if wider is not None:
        yield attempt.remedy("tensor_parallel_size", wider, wider.num_gpus)
    plain = attempt.shape.quantization is None and settings.quantization is None
    # Below Ampere no engine of ours computes with fp8 weights.
    if plain and attempt.device.bfloat16:
        packed = attempt.tried(replace(settings, quantization="fp8"))
        if packed is not None:
            yield attempt.remedy("quantization", packed)


def _smaller_batch(attempt: _Attempt) -> EngineSettings | None:
    settings = attempt.settings
    if settings.max_num_batched_tokens <= SMALLEST_BATCH_TOKENS:
        return None
    return attempt.tried(
        replace(
            settings,
            max_num_batched_tokens=SMALLEST_BATCH_TOKENS,
            max_num_seqs=min(settings.max_num_seqs, SMALLEST_BATCH_TOKENS),
        )
    )


def _fewer_sequences(attempt: _Attempt) -> EngineSettings | None:
    """Where the cache has no block for the state of each: halves until it has."""
    sequences = attempt.settings.max_num_seqs // 2
    while sequences >= FEWEST_SEQUENCES:
        found = attempt.tried(replace(attempt.settings, max_num_seqs=sequences))
        if found is not None:
            return found
        sequences //= 2
    return None


def _enough_ram_gib(attempt: _Attempt) -> float:
    """Tenths of a GiB that would hold one sequence at the usual share."""
    settings = attempt.settings
    needed_bytes = estimate(attempt.shape, settings, attempt.device, attempt.engine).needed_bytes
    return math.ceil(needed_bytes / settings.gpu_memory_utilization / GIB * 10) / 10


def _larger_degree(attempt: _Attempt) -> EngineSettings | None:
    for degree in DEGREES_TO_TRY:
        if degree <= attempt.settings.tensor_parallel_size:
            continue
        try:
            found = attempt.tried(replace(attempt.settings, tensor_parallel_size=degree))
        except Invalid:
            continue  # this degree does not divide the heads
        if found is not None:
            return found
    return None
