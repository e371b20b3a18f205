"""`ballast estimate`: will it fit, on what, and with which settings? Starts nothing."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.model_source import read_shape
from cluster.pins import Pins, read_pins
from deployments.engines.registry import engine_versions
from placement.nodes import Node
from placement.nvml import read_cards
from placement.words import nodes_from_words
from vram import defaults
from vram.calibration import read_calibration
from vram.dtypes import canonical_dtype
from vram.engines import ENGINES
from vram.errors import Invalid
from vram.estimate import Estimate, estimate
from vram.gpu import Device, cpu_device, device_named
from vram.model import ModelShape
from vram.model_names import approximate_parameters, approximate_weight_bytes
from vram.remedy import Remedy, remedies, shortage
from vram.residuals import Residuals, load_kind
from vram.settings import EngineSettings
from vram.units import gib_to_bytes

# Where nobody says which card, and this machine has none.
ASSUMED_CARD = "H100-80GB"
CPU = re.compile(r"cpu\s*[:x ]\s*(?P<gib>\d{1,6}(?:\.\d{1,3})?)\s*(?:gib|gb|g)?", re.IGNORECASE)
ON_ONE_CARD = frozenset({"transformers", "fake"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """Equal cards of an inventory."""

    device: Device
    per_node: int
    nodes: int

    @property
    def number(self) -> int:
        return self.per_node * self.nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What an estimate that does not fit lacks, and what would do."""

    at_fault: str  # an item, or where only their sum is too much: device_use_under_load
    needed_bytes: int
    available_bytes: int
    remedies: tuple[Remedy, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A model with these settings on these cards."""

    model: str
    engine: str
    cards: Cards
    settings: EngineSettings
    estimate: Estimate
    refusal: Refusal | None
    learned: Residuals | None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.refusal is None

    @property
    def gpus_missing(self) -> int:
        return max(0, self.settings.num_gpus - self.cards.number)


def answers(
    model: str,
    *,
    gpus: str | None,
    engine: str,
    pins: Sequence[str],
    calibration: Path | None = None,
) -> tuple[Answer, ...]:
    """One for each kind of card, those that fit first; else in the inventory's order.

    `calibration` is the file of what loads have taken; None for the formulas alone.
    """
    if engine not in ENGINES:
        raise Invalid(f"Unknown engine {engine[:40]!r}; known are {', '.join(ENGINES)}.", "engine")
    pinned = read_pins(pins)
    kinds, note = inventory(gpus)
    shape, notes = read_shape(model)
    notes = (*((note,) if note else ()), *notes)
    if calibration is not None:
        learned = read_calibration(calibration)
        if learned.num_skipped:
            notes += (f"{calibration}: {learned.num_skipped} lines cannot be read",)
        shape = replace(shape, learned=learned.of(shape, engine_versions()))
    found: list[Answer] = []
    refused: dict[str, Invalid] = {}
    for cards in kinds:
        try:
            found.append(answer(model, shape, cards, engine, pinned, notes))
        except Invalid as problem:  # a card without bfloat16, say: another may do
            refused[cards.device.name] = problem
    if not found:
        raise next(iter(refused.values()))
    passed = tuple(f"not on {card}: {problem}" for card, problem in refused.items())
    found = [replace(each, notes=each.notes + passed) for each in found]
    return tuple(sorted(found, key=lambda each: not each.fits))


def answer(
    model: str,
    shape: ModelShape,
    cards: Cards,
    engine: str,
    pins: Pins,
    notes: tuple[str, ...] = (),
) -> Answer:
    """The pins, and the engine's own defaults for the rest: on the fewest cards that hold them."""
    first_problem: Invalid | None = None
    widest: tuple[EngineSettings, Estimate] | None = None
    for degrees in _splits(shape, cards, engine, pins):
        try:
            settings = pins.on(
                defaults.settings_for(shape, pins.wishes, cards.device, engine, *degrees)
            )
            estimated = estimate(shape, settings, cards.device, engine)
        except Invalid as problem:
            first_problem = first_problem or problem
            continue
        widest = (settings, estimated)
        if estimated.fits:
            break
    if widest is None:
        assert first_problem is not None, "there is always one split to try"
        raise first_problem
    settings, estimated = widest
    notes += tuple(_remarks(settings, cards, pins))
    refusal = None
    if not estimated.fits or settings.num_gpus > cards.number:
        refusal = _refusal(shape, settings, cards.device, engine, estimated)
    return Answer(
        model=model,
        engine=engine,
        cards=cards,
        settings=settings,
        estimate=estimated,
        refusal=refusal,
        learned=shape.learned_of(load_kind(settings, cards.device, engine)),
        notes=notes,
    )


def _remarks(settings: EngineSettings, cards: Cards, pins: Pins) -> Iterator[str]:
    """What the numbers do not say."""
    if cards.per_node < settings.tensor_parallel_size <= cards.number:
        yield (
            f"tensor_parallel_size {settings.tensor_parallel_size} crosses nodes of "
            f"{cards.per_node}: ballast plan keeps it inside one and crosses by "
            "pipeline_parallel_size"
        )
    if settings.num_speculative_tokens:
        yield "num_speculative_tokens names no draft model: its weights and cache are not counted"
    if pins.wishes.max_lora_rank is not None and not settings.max_loras:
        yield "max_lora_rank has no effect without max_loras"


def inventory(gpus: str | None) -> tuple[tuple[Cards, ...], str]:
    """From words, else what this machine has, else a card that the note names."""
    if gpus is not None:
        cpu = CPU.fullmatch(gpus.strip())
        if cpu is not None:
            device = cpu_device(gib_to_bytes(float(cpu["gib"])))
            return (Cards(device=device, per_node=1, nodes=1),), ""
        return _kinds(nodes_from_words(gpus)), ""
    here = _cards_here()
    if here:
        counted = Counter(here)
        return tuple(Cards(device=d, per_node=n, nodes=1) for d, n in counted.items()), ""
    device = device_named(ASSUMED_CARD)
    note = f"no --gpus and no GPU here: shown for one {ASSUMED_CARD}"
    return (Cards(device=device, per_node=1, nodes=1),), note


def _kinds(nodes: Sequence[Node]) -> tuple[Cards, ...]:
    """Per kind of card the most that one node has, and how many nodes have as many."""
    most: dict[Device, Counter[int]] = {}
    for node in nodes:
        for device, number in Counter(node.gpus).items():
            most.setdefault(device, Counter())[number] += 1
    return tuple(
        Cards(device=device, per_node=max(counts), nodes=counts[max(counts)])
        for device, counts in most.items()
    )


def _cards_here() -> list[Device]:
    """By their driver."""
    try:
        return [card.device for card in read_cards()]
    except Invalid:
        return []


def _splits(shape: ModelShape, cards: Cards, engine: str, pins: Pins) -> Iterator[tuple[int, int]]:
    """Tensor x pipeline degrees, the fewest cards first: over a node's cards, then over nodes."""
    tensor, pipeline = pins.wishes.tensor_parallel_size, pins.wishes.pipeline_parallel_size
    yield 1 if tensor is None else tensor, 1 if pipeline is None else pipeline
    if engine in ON_ONE_CARD:
        return
    widest = tensor or 1
    if tensor is None:
        degree = 2
        while degree * (pipeline or 1) <= cards.per_node:
            if not shape.split_problem(degree):
                widest = degree
                yield degree, pipeline or 1
            degree *= 2
    if pipeline is None:
        for stages in range(2, min(cards.nodes, shape.num_layers) + 1):
            yield widest, stages


def _refusal(
    shape: ModelShape,
    settings: EngineSettings,
    device: Device,
    engine: str,
    estimated: Estimate,
) -> Refusal:
    needed_bytes, available_bytes = shortage(settings, estimated, device.total_bytes)
    return Refusal(
        at_fault=_at_fault(estimated),
        needed_bytes=needed_bytes,
        available_bytes=available_bytes,
        remedies=remedies(shape, settings, device, engine, device.total_bytes)
        if not estimated.fits
        else (),
    )


def _at_fault(estimated: Estimate) -> str:
    """The item that has to become smaller: the cache where it is short, else the largest other."""
    if estimated.fits:
        return "gpus"
    if 0 < estimated.item("kv_cache").bytes < estimated.least_cache_bytes:
        return "kv_cache"
    if estimated.cache_left_bytes > 0:
        return "device_use_under_load"
    others = [item for item in estimated.items if item.name != "kv_cache"]
    return max(others, key=lambda item: item.bytes).name


@dataclass(frozen=True, slots=True, kw_only=True)
class ByName:
    """What a name alone says: an approximation of the weights, and no more than that."""

    model: str
    parameters: int
    weight_bytes: int
    form: str
    note: str


def by_name(model: str, pins: Sequence[str]) -> ByName:
    """Reads nothing but the name. Raises `Invalid` if it names no size."""
    wishes = read_pins(pins).wishes
    dtype = canonical_dtype(wishes.dtype or "bfloat16")
    found = approximate_parameters(model)
    return ByName(
        model=model,
        parameters=int(found.parameters),
        weight_bytes=approximate_weight_bytes(model, dtype, wishes.quantization),
        form=wishes.quantization or dtype,
        note=found.note,
    )
