"""The policy `diagnose`: the smallest change that answers what was short, or why there is none."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from vram.answers import answers, may_repeat
from vram.budget import HIGHEST_SHARE
from vram.case import FP8_WEIGHTS, Case
from vram.changes import Change
from vram.errors import Invalid
from vram.floor import estimated, fits, free_limit_bytes, hidden_bytes, holds, may_fit, may_hold
from vram.gpu import CARDS_GIB
from vram.ladder import Rung
from vram.price import price
from vram.remedy import DEGREES_TO_TRY
from vram.settings import EngineSettings
from vram.shortage import Shortage
from vram.units import gib, gib_to_bytes

# Each step is a load of the engine; a model that needs more of them has another problem.
MAX_STEPS = 16


_Check = Callable[[Case, EngineSettings], bool]
_SHOULD: dict[str, _Check] = {"device": fits, "cache": holds, "nothing": lambda *_: True}
_COULD: dict[str, _Check] = {"device": may_fit, "cache": may_hold, "nothing": lambda *_: True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhausted:
    """No step is left, and why: what is needed, what there is, what would do."""

    reason: str


def next_step(case: Case) -> Rung | Exhausted:
    """What to go on with after the last shortage of the case."""
    if len(case.tried) > MAX_STEPS:
        return Exhausted(reason=f"{MAX_STEPS} steps were not enough; {_what_would_do(case)}")
    for group in answers(case):
        found = _choose(case, tuple(group))
        if found is not None:
            return Rung(
                name=found.name,
                settings=found.settings,
                price=price(case.settings, found.settings),
                skipped_reason=None,
                reason=describe(case.shortage),
            )
    return Exhausted(reason=f"{describe(case.shortage)}; {_what_would_do(case)}")


def describe(shortage: Shortage) -> str:
    """What was short, in words: "run_time: asked for 2.0 GiB, 1.5 GiB free"."""
    sizes = (
        ("asked for", shortage.asked_bytes),
        ("free", shortage.free_bytes),
        ("held by others", shortage.others_bytes),
        ("reserved and unused", shortage.reserved_bytes),
    )
    told = [f"{what} {gib(size)}" for what, size in sizes if size is not None]
    if shortage.max_model_len is not None:
        told.append(f"{shortage.max_model_len} tokens would fit")
    if shortage.max_num_seqs is not None:
        told.append(f"{shortage.max_num_seqs} sequences would fit")
    return f"{shortage.kind.value}: {', '.join(told) or 'no sizes were told'}"


def _choose(case: Case, group: tuple[Change, ...]) -> Change | None:
    possible = [change for change in group if _is_open(case, change.settings)]
    for works in _SHOULD, _COULD:
        for change in possible:
            if works[change.check](case, change.settings):
                return change
    return None


def _is_open(case: Case, settings: EngineSettings) -> bool:
    if settings == case.settings and may_repeat(case):
        return True
    return not case.has_died(settings) and case.is_permitted(settings)


def _what_would_do(case: Case) -> str:
    """Needed, available, and a card, degree or permission with which it would go on."""
    model, total_bytes = case.model, case.model.device.total_bytes
    smallest = replace(case.settings, max_model_len=case.shortest_tokens)
    smallest = replace(smallest, kv_cache_memory_bytes=None)
    try:
        found = estimated(case, smallest)
    except Invalid as error:
        return str(error)
    needed_bytes = found.needed_bytes + max(hidden_bytes(case), 0)
    told = [
        f"{model.name} at {smallest.max_model_len} tokens needs {gib(needed_bytes)} per GPU, "
        f"has {gib(free_limit_bytes(case))}"
    ]
    cards = [name for name, size in CARDS_GIB.items() if gib_to_bytes(size) > total_bytes]
    cards = [name for name in cards if gib_to_bytes(CARDS_GIB[name]) * HIGHEST_SHARE > needed_bytes]
    if model.device.kind == "cuda" and cards:
        told.append(f"a card of {min(CARDS_GIB[name] for name in cards):.0f} GiB would do")
    degree = _larger_degree(case, smallest)
    if degree is not None:
        told.append(f"or tensor_parallel_size {degree}")
    if model.shape.quantization is None and FP8_WEIGHTS not in model.allowed:
        told.append(f"or recovery.allow: [{FP8_WEIGHTS}]" if model.device.kind == "cuda" else "")
    return ", ".join(text for text in told if text)


def _larger_degree(case: Case, settings: EngineSettings) -> int | None:
    if case.model.device.kind == "cpu":
        return None
    for degree in DEGREES_TO_TRY:
        if degree <= settings.tensor_parallel_size or case.model.shape.split_problem(degree):
            continue
        if fits(case, replace(settings, tensor_parallel_size=degree)):
            return degree
    return None
