"""What smaller settings give up, in words. Knows no reasons and no bytes but those it is given."""

from collections.abc import Callable, Iterator

from vram.settings import EngineSettings
from vram.units import GIB, MIB, gib

NOTHING = "nothing"


def price(before: EngineSettings, after: EngineSettings) -> str:
    """Each difference as "context 32768 → 16208 tokens"; "nothing" for none."""
    return ", ".join(_differences(before, after)) or NOTHING


def _differences(before: EngineSettings, after: EngineSettings) -> Iterator[str]:
    old_share, new_share = before.gpu_memory_utilization, after.gpu_memory_utilization
    if old_share != new_share:
        yield f"utilisation {share_text(old_share)} → {share_text(new_share)}"
    if before.max_model_len != after.max_model_len:
        yield f"context {before.max_model_len} → {after.max_model_len} tokens"
    if before.kv_cache_memory_bytes != after.kv_cache_memory_bytes:
        yield f"KV cache {_cache(before)} → {_cache(after)}"
    for setting, say in _WORDS.items():
        old, new = getattr(before, setting), getattr(after, setting)
        if old != new:
            yield say(old, new)


def share_text(share: float) -> str:
    """Hundredths, and more digits where a share has them."""
    text = f"{share:.3f}"
    return text[:-1] if text.endswith("0") else text


def _cache(settings: EngineSettings) -> str:
    size_bytes = settings.kv_cache_memory_bytes
    if size_bytes is None:
        return "what the share leaves"
    return gib(size_bytes) if size_bytes >= GIB else f"{size_bytes / MIB:.0f} MiB"


def _arrow(what: str) -> Callable[[object, object], str]:
    return lambda old, new: f"{what} {old} → {new}"


_WORDS: dict[str, Callable[[object, object], str]] = {
    "kv_cache_dtype": _arrow("KV cache in"),
    "quantization": lambda old, new: f"weights in {old or 'their own format'} → {new}",
    "max_num_batched_tokens": _arrow("batched tokens"),
    "max_num_seqs": _arrow("sequences"),
    "max_cudagraph_capture_size": lambda old, new: f"CUDA graphs up to {old or 'all'} → {new}",
    "enforce_eager": lambda old, new: "no CUDA graphs" if new else "CUDA graphs",
    "expandable_segments": lambda old, new: f"expandable segments {'on' if new else 'off'}",
}
