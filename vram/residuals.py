"""What loads of the very same kind took beside what the formulas say. Reads no file.

The same kind is the same shape, formats, engine version, card and degrees. Residuals of one model
make the estimates of its relatives worse, so they are never carried over to one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from vram.gpu import Device
from vram.settings import EngineSettings
from vram.units import GIB

Kind = Literal["value", "ratio", "difference", "excess"]

# How each item is learned. Weights are what they are; activations grow with the batch, so a ratio;
# the others are sums with a constant part. The device is asked at any time, perhaps before the
# batch that takes most: it is only ever learned upwards.
LEARNED: Mapping[str, Kind] = {
    "weights": "value",
    "peak_activation": "ratio",
    "cuda_graphs": "difference",
    "non_torch": "difference",
    "device_use": "excess",
}

# Beyond these it is no residual: something else ran on the card, or a line was misread.
LOWEST_RATIO, HIGHEST_RATIO = 0.5, 2.0
LARGEST_DIFFERENCE_BYTES = 8 * GIB
# Of one kind of load, the newest count: drivers and libraries change without a version of ours.
NEWEST_LOADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadKind:
    """What has to be equal for one load to say something of another, besides the shape."""

    engine: str
    card: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    form: str  # formats, and what switches other code on


@dataclass(frozen=True, slots=True, kw_only=True)
class Residuals:
    """What is learned of one kind of load of one shape."""

    kind: LoadKind
    engine_version: str
    num_loads: int
    amounts: tuple[tuple[str, float], ...]  # by item, in the way that LEARNED says

    def corrected(self, item: str, size_bytes: int) -> int:
        """The item as the loads say it is; untouched where they say nothing, or it is 0."""
        amount = dict(self.amounts).get(item)
        if amount is None or (size_bytes == 0 and item != "device_use"):
            return size_bytes
        match LEARNED[item]:
            case "value":
                return int(amount)
            case "ratio":
                return int(size_bytes * amount)
            case "difference" | "excess":
                return max(int(size_bytes + amount), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One load: by item, what the formulas said and what it took, in bytes."""

    estimated: Mapping[str, int]
    measured: Mapping[str, int]


def load_kind(settings: EngineSettings, device: Device, engine: str) -> LoadKind:
    """The kind that a load with these settings is of."""
    parts = [settings.dtype, settings.quantization or "plain", f"kv {settings.kv_cache_dtype}"]
    parts += ["eager"] if settings.enforce_eager else []
    parts += ["expert parallel"] if settings.expert_parallel else []
    parts += [f"{settings.max_loras} x {settings.max_lora_rank}"] if settings.max_loras else []
    parts += ["speculative"] if settings.num_speculative_tokens else []
    captured = settings.max_cudagraph_capture_size
    parts += [] if captured is None else [f"graphs to {captured}"]
    parts += ["expandable"] if settings.expandable_segments else []
    return LoadKind(
        engine=engine,
        card=device.name,
        tensor_parallel_size=settings.tensor_parallel_size,
        pipeline_parallel_size=settings.pipeline_parallel_size,
        form=", ".join(parts),
    )


def residuals(kind: LoadKind, engine_version: str, loads: Sequence[Seen]) -> Residuals:
    """The middle of what the newest of these loads say; they are in the order of time."""
    newest = loads[-NEWEST_LOADS:]
    amounts = {}
    for item in LEARNED:
        said = [_amount(item, load) for load in newest]
        known = [amount for amount in said if amount is not None]
        if known:
            amounts[item] = median(known)
    return Residuals(
        kind=kind,
        engine_version=engine_version,
        num_loads=len(newest),
        amounts=tuple(amounts.items()),
    )


def _amount(item: str, load: Seen) -> float | None:
    """What one load says of an item; None where it says nothing that can be believed."""
    estimated, measured = load.estimated.get(item), load.measured.get(item)
    if estimated is None or measured is None or estimated <= 0 or measured <= 0:
        return None
    ratio, difference = measured / estimated, measured - estimated
    match LEARNED[item]:
        case "value":
            return measured if LOWEST_RATIO <= ratio <= HIGHEST_RATIO else None
        case "ratio":
            return min(max(ratio, LOWEST_RATIO), HIGHEST_RATIO)
        case "difference":
            return min(max(difference, -LARGEST_DIFFERENCE_BYTES), LARGEST_DIFFERENCE_BYTES)
        case "excess":
            return min(max(difference, 0), LARGEST_DIFFERENCE_BYTES)
