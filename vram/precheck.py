"""The check before each load: does it fit in what is free now, and if not, with which share?"""

from dataclasses import dataclass, replace

from vram.budget import share_down, share_up, within
from vram.estimate import Estimate, estimate
from vram.gpu import Device
from vram.model import ModelShape
from vram.remedy import describe, refusal, shortage
from vram.settings import EngineSettings
from vram.units import gib


@dataclass(frozen=True, slots=True, kw_only=True)
class PreCheck:
    """The settings to load with, and one line that says what was asked, needed and changed."""

    settings: EngineSettings
    line: str
    line_zh: str
    changed: bool


def precheck(
    shape: ModelShape,
    settings: EngineSettings,
    device: Device,
    available_bytes: int,
    engine: str = "vllm",
    name: str = "",
) -> PreCheck:
    """Moves the share of the device to what is free; DoesNotFit when no share helps."""
    label = name or shape.architecture
    limit_bytes = min(available_bytes, device.total_bytes)
    estimated = estimate(shape, settings, device, engine)
    if estimated.fits and estimated.device_use_under_load_bytes <= limit_bytes:
        return _unchanged(label, settings, estimated, device, available_bytes)
    found = within(shape, settings, device, engine, limit_bytes)
    if found is None:
        raise refusal(label, shape, settings, device, engine, limit_bytes)
    if found.kv_cache_memory_bytes is not None:
        found = _with_matching_share(shape, found, device, engine, limit_bytes)
    needed_bytes, offered_bytes = shortage(settings, estimated, limit_bytes)
    asked = f"{settings.gpu_memory_utilization:.2f}"
    budget = gib(estimated.budget_bytes)
    changes = ", ".join(_changes(settings, found))
    memory_zh = "内存" if device.kind == "cpu" else "显存"
    return PreCheck(
        settings=found,
        line=(
            f"{label} at {settings.max_model_len} tokens asks for {asked} of {describe(device)} "
            f"({budget}), short of memory: needs {gib(needed_bytes)}, "
            f"{gib(offered_bytes)} available; {changes}."
        ),
        line_zh=(
            f"{label}（{settings.max_model_len} tokens）请求 {device.name} 的 {asked}（{budget}），"
            f"{memory_zh}不足：需要 {gib(needed_bytes)}，可用 {gib(offered_bytes)}；{changes}。"
        ),
        changed=True,
    )


def _unchanged(
    label: str,
    settings: EngineSettings,
    estimated: Estimate,
    device: Device,
    available_bytes: int,
) -> PreCheck:
    asked = f"{settings.gpu_memory_utilization:.2f}"
    budget = gib(estimated.budget_bytes)
    needed = gib(estimated.device_use_under_load_bytes)
    available = gib(available_bytes)
    return PreCheck(
        settings=settings,
        line=(
            f"{label} at {settings.max_model_len} tokens asks for {asked} of {describe(device)} "
            f"({budget}), needs {needed} under load, {available} available; nothing changed."
        ),
        line_zh=(
            f"{label}（{settings.max_model_len} tokens）请求 {device.name} 的 {asked}（{budget}），"
            f"负载下需要 {needed}，可用 {available}；未作更改。"
        ),
        changed=False,
    )


def _with_matching_share(
    shape: ModelShape,
    settings: EngineSettings,
    device: Device,
    engine: str,
    limit_bytes: int,
) -> EngineSettings:
    """Cache bytes rule; the share follows, because vLLM wants it free before it starts."""
    total_bytes = estimate(shape, settings, device, engine).total_bytes
    share = min(
        settings.gpu_memory_utilization,
        share_up(total_bytes, device),
        max(share_down(limit_bytes, device), 0.01),
    )
    return replace(settings, gpu_memory_utilization=share)


def _changes(before: EngineSettings, after: EngineSettings) -> list[str]:
    changes = []
    if after.gpu_memory_utilization != before.gpu_memory_utilization:
        changes.append(
            f"gpu_memory_utilization {before.gpu_memory_utilization:.2f} → "
            f"{after.gpu_memory_utilization:.2f}"
        )
    old_bytes, new_bytes = before.kv_cache_memory_bytes, after.kv_cache_memory_bytes
    if old_bytes is not None and new_bytes is not None and old_bytes != new_bytes:
        changes.append(f"KV cache {gib(old_bytes)} → {gib(new_bytes)}")
    return changes
