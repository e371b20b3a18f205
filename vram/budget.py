"""Turns settings until they fit in so many bytes of a device. Chooses between no two models."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from vram.estimate import Estimate, estimate
from vram.gpu import Device
from vram.model import ModelShape
from vram.settings import EngineSettings

# Shares are kept in hundredths: people read and write them so.
STEPS = 100
# A card is never handed out to the last hundredth: the desktop, the driver and other processes
# take some, and vLLM refuses to start when its share is not free.
HIGHEST_SHARE = 0.97


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """The shares of a device between which an engine starts and stays within its limit."""

    lowest: float  # below it, the KV cache does not hold one sequence
    highest: float  # above it, the device holds more than the limit under load

    @property
    def possible(self) -> bool:
        return 0 < self.lowest <= self.highest


def shares(estimated: Estimate, device: Device, limit_bytes: int, cache_bytes: int = 0) -> Shares:
    """Bounds on gpu_memory_utilization for an engine that sizes its cache from its budget.

    `cache_bytes` is what the cache has to hold if that is more than one sequence.
    """
    counted_bytes = estimated.budget_bytes - estimated.cache_left_bytes  # fixed, inside the budget
    outside_bytes = (
        estimated.device_use_under_load_bytes
        - estimated.total_bytes
        + estimated.fixed_bytes
        - counted_bytes
    )
    return Shares(
        lowest=share_up(counted_bytes + max(estimated.sequence_bytes, cache_bytes), device),
        highest=min(share_down(limit_bytes - outside_bytes, device), HIGHEST_SHARE),
    )


def within(
    shape: ModelShape,
    settings: EngineSettings,
    device: Device,
    engine: str,
    limit_bytes: int,
    least_cache_bytes: int = 0,
) -> EngineSettings | None:
    """The settings with the nearest share (or cache bytes) that fits the limit; None for none."""
    estimated = estimate(shape, settings, device, engine)
    if settings.kv_cache_memory_bytes is not None:
        return _with_cache_bytes(settings, estimated, limit_bytes, least_cache_bytes)
    bounds = shares(estimated, device, limit_bytes, least_cache_bytes)
    if not bounds.possible:
        return None
    share = min(max(settings.gpu_memory_utilization, bounds.lowest), bounds.highest)
    changed = replace(settings, gpu_memory_utilization=share)
    return changed if estimate(shape, changed, device, engine).fits else None


def longest_context(
    settings: EngineSettings,
    fitted: Callable[[EngineSettings], EngineSettings | None],
    shortest_tokens: int,
) -> EngineSettings | None:
    """The longest max_model_len, up to that of the settings, for which `fitted` finds room."""
    best: EngineSettings | None = None
    low, high = shortest_tokens, settings.max_model_len
    while low <= high:
        middle = (low + high) // 2
        found = fitted(replace(settings, max_model_len=middle))
        if found is None:
            high = middle - 1
        else:
            best, low = found, middle + 1
    return best


def _with_cache_bytes(
    settings: EngineSettings, estimated: Estimate, limit_bytes: int, least_cache_bytes: int
) -> EngineSettings | None:
    cache_bytes = estimated.item("kv_cache").bytes
    room_bytes = limit_bytes - (estimated.device_use_under_load_bytes - cache_bytes)
    least_bytes = max(estimated.sequence_bytes, least_cache_bytes)
    if room_bytes < least_bytes:
        return None
    fitting_bytes = min(max(cache_bytes, least_bytes), room_bytes)
    return replace(settings, kv_cache_memory_bytes=fitting_bytes)


def share_up(size_bytes: int, device: Device) -> float:
    """The smallest share in hundredths that is at least this many bytes."""
    return math.ceil(size_bytes / device.total_bytes * STEPS + 1e-6) / STEPS


def share_down(size_bytes: int, device: Device) -> float:
    """The largest share in hundredths that is at most this many bytes."""
    return max(math.floor(size_bytes / device.total_bytes * STEPS + 1e-6), 0) / STEPS
