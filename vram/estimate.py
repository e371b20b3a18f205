"""What a model with these settings holds per GPU, item by item. Chooses nothing."""

from dataclasses import dataclass, replace

from vram import overhead
from vram.activations import encoder_bytes, peak_activation
from vram.adapters import adapter_bytes
from vram.allocator import kept_blocks
from vram.attention import split_accumulators
from vram.check import check
from vram.engines import FILL_THEIR_BUDGET
from vram.gpu import Device
from vram.graphs import counted_graph_bytes, cuda_graphs, driver_bytes
from vram.kv_cache import CacheLayout, cache_layout
from vram.learned import corrected, excess
from vram.model import ModelShape
from vram.overhead import Overhead, newer_runner
from vram.residuals import load_kind
from vram.settings import EngineSettings
from vram.shortfall import shortfall
from vram.weights import weight_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One line of an estimate."""

    name: str
    bytes: int
    formula: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Per GPU, in bytes. `reason` says why it does not fit; empty when it does."""

    engine: str
    items: tuple[Item, ...]  # what the engine counts, or should
    outside: tuple[Item, ...]  # what the device holds besides, once requests have run
    at_peak: tuple[Item, ...]  # what the hardest batch takes on top, and the engine then keeps
    budget_bytes: int  # the share of the card that the settings hand to the engine
    total_bytes: int
    device_use_under_load_bytes: int
    kv_cache_tokens: int
    sequence_bytes: int  # KV cache of one sequence of max_model_len
    least_cache_bytes: int  # with which it starts: that, and a block for each sequence's state
    token_bytes: int  # KV cache of one token
    cache_left_bytes: int  # what the budget leaves for the KV cache; negative when over it
    reason: str

    @property
    def fits(self) -> bool:
        return not self.reason

    @property
    def fixed_bytes(self) -> int:
        """Everything but the cache."""
        return self.total_bytes - self.item("kv_cache").bytes

    @property
    def needed_bytes(self) -> int:
        """The least the device must offer: everything fixed, and one whole sequence."""
        outside = self.device_use_under_load_bytes - self.total_bytes
        return self.fixed_bytes + self.sequence_bytes + outside

    @property
    def device_use_at_peak_bytes(self) -> int:
        """What the device holds once the hardest batch has run: the most that its tenants see."""
        return self.device_use_under_load_bytes + sum(item.bytes for item in self.at_peak)

    def item(self, name: str) -> Item:
        named = (*self.items, *self.outside, *self.at_peak)
        return next(item for item in named if item.name == name)


def estimate(
    shape: ModelShape,
    settings: EngineSettings,
    device: Device,
    engine: str = "vllm",
    draft: ModelShape | None = None,
) -> Estimate:
    """Itemises the memory of one GPU; raises Invalid for a split that the model does not allow."""
    check(shape, settings, device, engine)
    fixed = _fixed(shape, settings, device, engine, draft)
    found = shape.learned_of(load_kind(settings, device, engine)) if shape.learned else None
    if found is not None:
        fixed = corrected(fixed, found)
    fixed_bytes = sum(part.size_bytes for part in fixed.values())
    budget_bytes = int(device.total_bytes * settings.gpu_memory_utilization)
    graph_bytes = fixed["cuda_graphs"].size_bytes
    counted_bytes = (
        fixed_bytes
        - fixed["communication"].size_bytes
        - graph_bytes
        + counted_graph_bytes(shape, device, engine, graph_bytes)
    )
    cache_left_bytes = budget_bytes - counted_bytes
    layout = cache_layout(shape, settings, device, engine, draft)
    sequence_bytes = layout.sequence_bytes(settings.max_model_len)
    cache = _cache(settings, engine, layout, sequence_bytes, cache_left_bytes)
    total_bytes = fixed_bytes + cache.size_bytes
    outside = overhead.outside_budget(shape, settings, device, engine)
    if device.kind == "cuda":
        peak_bytes = fixed["peak_activation"].size_bytes
        outside["allocator_slack"] = kept_blocks(shape, settings, device, engine, peak_bytes)
    under_load_bytes = total_bytes + sum(part.size_bytes for part in outside.values())
    if found is not None:
        formula = estimate(replace(shape, learned=()), settings, device, engine, draft)
        outside["learned"] = excess(formula.device_use_under_load_bytes, under_load_bytes, found)
        under_load_bytes += outside["learned"].size_bytes
    reason = shortfall(
        settings, device, layout, cache.size_bytes, cache_left_bytes, under_load_bytes, fixed
    )
    return Estimate(
        engine=engine,
        items=_items({"weights": fixed.pop("weights"), "kv_cache": cache} | fixed),
        outside=_items(outside),
        at_peak=_items(_at_peak(shape, settings, device, engine)),
        budget_bytes=budget_bytes,
        total_bytes=total_bytes,
        device_use_under_load_bytes=under_load_bytes,
        kv_cache_tokens=layout.tokens(cache.size_bytes, settings.max_model_len),
        sequence_bytes=sequence_bytes,
        least_cache_bytes=max(sequence_bytes, layout.states_bytes(settings.max_num_seqs)),
        token_bytes=layout.token_bytes,
        cache_left_bytes=cache_left_bytes,
        reason=reason,
    )


def _fixed(
    shape: ModelShape,
    settings: EngineSettings,
    device: Device,
    engine: str,
    draft: ModelShape | None,
) -> dict[str, Overhead]:
    """Everything but the cache; adapters and a draft only where there are some."""
    fixed = {
        "weights": _weights(shape, settings, device),
        "peak_activation": peak_activation(shape, settings, device, engine),
        "cuda_graphs": cuda_graphs(shape, settings, device, engine),
        "non_torch": overhead.non_torch(settings, device, engine),
        "communication": overhead.communication(shape, settings, device),
    }
    if settings.max_loras:
        fixed["lora"] = Overhead(
            size_bytes=adapter_bytes(shape, settings),
            formula=f"{settings.max_loras} slots x rank {settings.max_lora_rank} x projections",
            source="vLLM 0.26, lora/layers; not measured",
        )
    if draft is not None:
        fixed["draft_model"] = _draft(draft, settings, device, engine)
    return fixed


def _draft(draft: ModelShape, settings: EngineSettings, device: Device, engine: str) -> Overhead:
    """Its weights and graphs; its batches are narrower than the model's, and come after them."""
    weights = _weights(draft, settings, device)
    graph_bytes = 0
    if overhead.compiles(settings, device, engine):
        graph_bytes = driver_bytes(draft, settings)
    return Overhead(
        size_bytes=weights.size_bytes + graph_bytes,
        formula=f"{weights.formula} + its layers x captures",
        source=weights.source,
    )


def _weights(shape: ModelShape, settings: EngineSettings, device: Device) -> Overhead:
    packed = shape.quantization or settings.quantization
    form = f"{packed} and {settings.dtype}" if packed else settings.dtype
    source = "config.json" if shape.checkpoint_ratio == 1.0 else "safetensors headers"
    return Overhead(
        size_bytes=weight_bytes(shape, settings, rounded=device.kind == "cuda"),
        formula=f"{shape.parameter_count} parameters in {form} / {settings.num_gpus} GPU",
        source=source,
    )


def _at_peak(
    shape: ModelShape, settings: EngineSettings, device: Device, engine: str
) -> dict[str, Overhead]:
    at_peak = {"split_accumulators": split_accumulators(shape, settings, device, engine)}
    if shape.encoder_width and device.kind == "cuda" and newer_runner(shape, device, engine):
        at_peak["encoder_batch"] = Overhead(
            size_bytes=encoder_bytes(shape, settings),
            formula="a batch of images: max_num_batched_tokens x the tower's widest layer x dtype",
            source="vLLM 0.26: its newer runner does not profile the tower; not measured",
        )
    return at_peak


def _items(parts: dict[str, Overhead]) -> tuple[Item, ...]:
    return tuple(
        Item(name=name, bytes=part.size_bytes, formula=part.formula, source=part.source)
        for name, part in parts.items()
    )


def _cache(
    settings: EngineSettings,
    engine: str,
    layout: CacheLayout,
    sequence_bytes: int,
    cache_left_bytes: int,
) -> Overhead:
    if not layout.groups:
        return Overhead(size_bytes=0, formula="an encoder keeps nothing", source="config.json")
    if settings.kv_cache_memory_bytes is not None:
        return Overhead(
            size_bytes=settings.kv_cache_memory_bytes,
            formula="kv_cache_memory_bytes",
            source="settings",
        )
    left_bytes = max(cache_left_bytes, 0)
    if engine in FILL_THEIR_BUDGET:
        return Overhead(
            size_bytes=left_bytes,
            formula="gpu_memory_utilization x total - the other items",
            source="settings",
        )
    return Overhead(
        size_bytes=min(settings.max_num_seqs * sequence_bytes, left_bytes),
        formula="max_num_seqs x max_model_len x bytes per token, inside the budget",
        source="settings",
    )
