"""How good an estimate has to be, and one load's estimate beside its measurement."""

from dataclasses import dataclass

from benchmarks.estimator_loads import Load, device
from vram.estimate import Estimate
from vram.units import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How far an estimate may be off: relative, or in GiB; and how far below."""

    item: str
    most: float
    is_relative: bool = True
    least: float | None = None

    def kept(self, error: float) -> bool:
        lowest = -self.most if self.least is None else self.least
        return lowest <= error <= self.most

    def text(self, error: float) -> str:
        return f"{error:+.2%}" if self.is_relative else f"{error:+.3f} GiB"


# The device's use within 2 %, none under-estimated by more than 1 %.
LIMITS = (
    Limit(item="weights", most=0.01),
    Limit(item="kv_cache_tokens", most=0.02),
    Limit(item="peak_activation", most=0.15),
    Limit(item="cuda_graphs", most=0.3, is_relative=False),
    Limit(item="non_torch", most=0.3, is_relative=False),
    Limit(item="device", most=0.02, least=-0.01),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One load's estimate beside its measurement; GiB, but tokens."""

    load: Load
    estimated: dict[str, float]

    def error(self, limit: Limit) -> float:
        ours, measured = self.estimated[limit.item], self.load.measured[limit.item]
        return ours / measured - 1 if limit.is_relative else ours - measured


def compared(loads: list[Load]) -> list[Comparison]:
    return [Comparison(load=load, estimated=values(load.estimated(device()))) for load in loads]


def values(found: Estimate) -> dict[str, float]:
    """An estimate in the units of the measurements."""
    sizes = {item.name: item.bytes / GIB for item in found.items}
    sizes["kv_cache_tokens"] = found.kv_cache_tokens
    sizes["device"] = found.device_use_under_load_bytes / GIB
    sizes["device_hard"] = found.device_use_at_peak_bytes / GIB
    return sizes


def kept(found: list[Comparison], limit: Limit) -> bool:
    return all(limit.kept(comparison.error(limit)) for comparison in found)
