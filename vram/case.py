"""A model that ran out of memory: what it was started with, what that ended in, what is allowed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vram.budget import HIGHEST_SHARE
from vram.gpu import Device
from vram.model import ModelShape
from vram.settings import EngineSettings
from vram.shortage import Shortage
from vram.wishes import Wishes

# What the user has to allow: it changes what a model answers, not only how much and how fast.
FP8_KV_CACHE = "fp8_kv_cache"
FP8_WEIGHTS = "fp8_weights"
PERMISSIONS = (FP8_KV_CACHE, FP8_WEIGHTS)

# The plan's own shortest context: less serves nobody. Whoever pins a shorter one has that.
SHORTEST_CONTEXT_TOKENS = 1024

# May only become less, or turn on; everything that is not named here or below stays.
_ONLY_LESS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
_ONLY_ON = ("enforce_eager", "expandable_segments")
_MEMORY = ("gpu_memory_utilization", "kv_cache_memory_bytes")
_FIXED = (
    "dtype",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "expert_parallel",
    "max_loras",
    "max_lora_rank",
    "num_speculative_tokens",
    "enable_prefix_caching",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One load, or one life, that ended. Without a shortage the engine refused the settings."""

    asked: EngineSettings
    settings: EngineSettings  # as the check before the load left them
    shortage: Shortage | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What does not change from one step to the next."""

    name: str
    shape: ModelShape
    device: Device
    engine: str
    planned: EngineSettings  # the upper bound of every step
    limit_bytes: int  # this model's share of the device
    wishes: Wishes
    allowed: frozenset[str]  # of PERMISSIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, its history of shortages (oldest first, at least one), and who waits for it."""

    model: Model
    tried: tuple[Tried, ...]
    longest_request_tokens: int = 0

    @property
    def last(self) -> Tried:
        """The latest that says what was short; what was refused after it is undone."""
        return next(tried for tried in reversed(self.tried) if tried.shortage is not None)

    @property
    def shortage(self) -> Shortage:
        shortage = self.last.shortage
        assert shortage is not None
        return shortage

    @property
    def settings(self) -> EngineSettings:
        """That died, and that the next step starts from."""
        return self.last.settings

    @property
    def repeats(self) -> int:
        """How often in a row, up to now, the same was short."""
        kinds = [tried.shortage.kind for tried in self.tried if tried.shortage is not None]
        others = (back for back, kind in enumerate(reversed(kinds)) if kind is not kinds[-1])
        return next(others, len(kinds))

    @property
    def shortest_tokens(self) -> int:
        """No step makes the context shorter: a request in flight could not be replayed."""
        usual = min(SHORTEST_CONTEXT_TOKENS, self.model.planned.max_model_len)
        return max(usual, self.longest_request_tokens)

    @property
    def highest_share(self) -> float:
        """The largest share of the device that this model may ask for."""
        planned, device = self.model.planned.gpu_memory_utilization, self.model.device
        if self.model.wishes.gpu_memory_utilization is not None:
            return planned
        return max(planned, min(self.model.limit_bytes / device.total_bytes, HIGHEST_SHARE))

    def has_died(self, settings: EngineSettings) -> bool:
        """Whether these settings were tried before, in whichever way they ended."""
        return any(settings in (tried.asked, tried.settings) for tried in self.tried)

    def is_permitted(self, settings: EngineSettings) -> bool:
        """Within what was planned, the context floor, the user's permission, and no refusal."""
        planned = self.model.planned
        captured, most = settings.max_cudagraph_capture_size, planned.max_cudagraph_capture_size
        return (
            all(getattr(settings, name) == getattr(planned, name) for name in _FIXED)
            and all(getattr(settings, name) <= getattr(planned, name) for name in _ONLY_LESS)
            and all(getattr(settings, name) >= getattr(planned, name) for name in _ONLY_ON)
            and (most is None or (captured is not None and captured <= most))
            and settings.gpu_memory_utilization <= self.highest_share
            and settings.max_model_len >= min(self.shortest_tokens, self.settings.max_model_len)
            and settings.max_num_seqs <= settings.max_num_batched_tokens
            and self._formats_are_permitted(settings)
            and not any(getattr(settings, name) == value for name, value in self._refused())
        )

    def _formats_are_permitted(self, settings: EngineSettings) -> bool:
        model = self.model
        if settings.kv_cache_dtype != model.planned.kv_cache_dtype and (
            FP8_KV_CACHE not in model.allowed or model.wishes.kv_cache_dtype is not None
        ):
            return False
        return settings.quantization == model.planned.quantization or (
            FP8_WEIGHTS in model.allowed and model.planned.quantization is None
        )

    def _refused(self) -> Iterator[tuple[str, Any]]:
        """Settings, each with the value that the engine did not take."""
        before: EngineSettings | None = None
        for tried in self.tried:
            if tried.shortage is not None:
                before = tried.settings
                continue
            for name in EngineSettings.__dataclass_fields__:
                value = getattr(tried.settings, name)
                if before is None or name in _MEMORY or getattr(before, name) == value:
                    continue
                yield name, value
