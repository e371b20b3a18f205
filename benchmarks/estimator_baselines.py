"""What other formulas say of the same loads: GPUStack's, accelerate's, the seeds'.

Each is judged on what it claims to know: weights, tokens in the cache, and the memory that a model
with one sequence of its full context needs on a card. The last is what the device held, less the
cache, and one sequence by our own arithmetic, which the measured caches bear out to 0.2 %.
"""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.estimator_loads import Load
from vram.dtypes import dtype_bytes
from vram.errors import Invalid
from vram.gpu import Device
from vram.model_names import approximate_parameters
from vram.units import GIB
from vram.weights import checkpoint_bits

ITEMS = ("weights", "kv_cache_tokens", "needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a formula says of a load; None where it has no such term. GiB, tokens."""

    weights: float | None
    kv_cache_tokens: float | None
    needed: float


def ballast(load: Load, device: Device) -> Claim:
    found = load.estimated(device)
    return Claim(
        weights=found.item("weights").bytes / GIB,
        kv_cache_tokens=found.kv_cache_tokens,
        needed=found.needed_bytes / GIB,
    )


def gpustack(load: Load, device: Device) -> Claim:
    """GPUStack 2.3.0, estimate_model_vram: the checkpoint's size x 1.2 + 2 GiB, no cache."""
    weights = _checkpoint_gib(load)
    return Claim(weights=weights, kv_cache_tokens=None, needed=weights * 1.2 + 2)


def accelerate(load: Load, device: Device) -> Claim:
    """accelerate 1.15, estimate-memory: the weights alone."""
    weights = _checkpoint_gib(load)
    return Claim(weights=weights, kv_cache_tokens=None, needed=weights)


def seeds(load: Load, device: Device) -> Claim | None:
    """Parameters from the name; 2 x layers x length x hidden x bytes / TP; none without a size.

    Grouped queries and windows are not known to it.
    """
    try:
        parameters = approximate_parameters(load.model).parameters
    except Invalid:
        return None
    element_bytes = dtype_bytes(load.settings.dtype)
    weights = parameters * element_bytes / load.settings.num_gpus / GIB
    token_gib = (
        2  # key and value
        * load.shape.num_layers
        * load.shape.hidden_size
        * element_bytes
        / load.settings.num_gpus
        / GIB
    )
    return Claim(
        weights=weights,
        kv_cache_tokens=load.measured["kv_cache"] / token_gib,
        needed=weights + token_gib * load.settings.max_model_len,
    )


FORMULAS: dict[str, Callable[[Load, Device], Claim | None]] = {
    "Ballast": ballast,
    "GPUStack 2.3": gpustack,
    "accelerate estimate-memory": accelerate,
    "seeds": seeds,
}


def errors(load: Load, device: Device) -> dict[str, dict[str, float | None]]:
    """By formula and item, relative to what was measured."""
    sequence_gib = load.estimated(device).sequence_bytes / GIB
    measured = {
        "weights": load.measured["weights"],
        "kv_cache_tokens": load.measured["kv_cache_tokens"],
        "needed": load.measured["device"] - load.measured["kv_cache"] + sequence_gib,
    }
    found: dict[str, dict[str, float | None]] = {}
    for name, formula in FORMULAS.items():
        claim = formula(load, device)
        found[name] = {
            item: None if value is None else value / measured[item] - 1
            for item, value in ((item, getattr(claim, item, None)) for item in ITEMS)
        }
    return found


def _checkpoint_gib(load: Load) -> float:
    """The files' size on each GPU."""
    return checkpoint_bits(load.shape) / 8 / GIB / load.settings.num_gpus
