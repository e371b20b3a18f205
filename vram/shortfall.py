"""Why an estimate does not fit, in the words of the item at fault."""

from collections.abc import Mapping

from vram.gpu import Device
from vram.kv_cache import CacheLayout
from vram.overhead import Overhead
from vram.settings import EngineSettings
from vram.units import gib

STATES_DO_NOT_FIT = "Each of"  # so begins the reason


def shortfall(
    settings: EngineSettings,
    device: Device,
    layout: CacheLayout,
    cache_bytes: int,
    cache_left_bytes: int,
    under_load_bytes: int,
    fixed: Mapping[str, Overhead],
) -> str:
    """The first thing that is wrong, with its sizes; empty if nothing is."""
    share = f"{settings.gpu_memory_utilization:.2f} of {gib(device.total_bytes)}"
    largest = max(fixed, key=lambda name: fixed[name].size_bytes)
    most = f"{largest} {gib(fixed[largest].size_bytes)} of it"
    if not layout.groups and cache_left_bytes < 0:
        return f"Weights, activations and overhead take more than {share}, {most}."
    if layout.groups and cache_bytes <= 0:
        return (
            f"No room for the KV cache: weights, activations and overhead take all of {share}, "
            f"{most}."
        )
    sequence_bytes = layout.sequence_bytes(settings.max_model_len)
    if cache_bytes < sequence_bytes:
        longest = layout.longest_context(cache_bytes, settings.max_model_len)
        return (
            f"One sequence of {settings.max_model_len} tokens needs {gib(sequence_bytes)} of "
            f"KV cache and {gib(cache_bytes)} are left: enough for {longest} tokens."
        )
    states = layout.num_pages(cache_bytes)
    if layout.pooled and layout.has_states and settings.max_num_seqs > states:
        return (
            f"{STATES_DO_NOT_FIT} {settings.max_num_seqs} sequences needs a block for its state, "
            f"and the cache has {states}."
        )
    if under_load_bytes > device.total_bytes:
        return (
            f"Under load the device would hold {gib(under_load_bytes)} "
            f"of its {gib(device.total_bytes)}."
        )
    return ""
