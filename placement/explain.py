"""What a plan gives up for less: the next smaller card, the ladder, the floor. Prints nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from placement.choose import Placed
from placement.kinds import USUAL_CARDS_PER_NODE, CardKind, next_smaller
from placement.menu import Menu, menu
from placement.options import Option, Refused
from vram.budget import shares
from vram.engines import FILL_THEIR_BUDGET
from vram.gpu import Device
from vram.ladder import Rung, fixed_ladder
from vram.plan import Plan
from vram.settings import EngineSettings

CHANGES_WORTH_SAYING = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_dtype",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One setting on the way from the plan to a smaller one."""

    setting: str
    before: object
    after: object


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallerCard:
    """What the plan would be there; None with the reason if there is none."""

    device: Device
    plan: Plan | None
    changes: tuple[Change, ...]
    refused: Refused | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The least that serves one request of the planned context on these cards. Bytes per GPU."""

    needed_bytes: int
    lowest_share: float | None  # of the card; None where the engine does not fill a budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a replica is where it is and not elsewhere, and what comes after a shortage."""

    refused: tuple[Refused, ...]
    not_taken: tuple[Option, ...]  # they would do, and come after the chosen one
    smaller: SmallerCard | None
    ladder: tuple[Rung, ...]
    floor: Floor


def explain(placed: Placed, found: Menu, kinds: Sequence[CardKind]) -> Explanation:
    number = len(placed.passed_over) + 1
    return Explanation(
        refused=found.refused,
        not_taken=found.options[number:],
        smaller=_smaller_card(placed, kinds),
        ladder=fixed_ladder(
            placed.plan.settings, placed.request.shape, placed.plan.device, placed.plan.engine
        ),
        floor=_floor(placed.plan),
    )


def _smaller_card(placed: Placed, kinds: Sequence[CardKind]) -> SmallerCard | None:
    """On the same wishes and as many cards as a node has; the card itself is let go of."""
    if placed.option is None:
        return None
    device = next_smaller(placed.plan.device, kinds)
    if device is None:
        return None
    here = next((kind for kind in kinds if kind.device == device), None)
    kind = here or CardKind(
        device=device,
        most_on_a_node=USUAL_CARDS_PER_NODE,
        total=USUAL_CARDS_PER_NODE,
        nvlink=placed.option.kind.nvlink,
    )
    found = menu(replace(placed.request, device=None), [kind])
    if not found.options:
        refused = found.refused[-1] if found.refused else None
        return SmallerCard(device=device, plan=None, changes=(), refused=refused)
    smaller = found.options[0].plan
    return SmallerCard(
        device=device, plan=smaller, changes=changes(placed.plan, smaller), refused=None
    )


def changes(before: Plan, after: Plan) -> tuple[Change, ...]:
    """What differs, in the order in which people ask for it."""
    pairs: list[tuple[str, object, object]] = [
        (setting, getattr(before.settings, setting), getattr(after.settings, setting))
        for setting in CHANGES_WORTH_SAYING
    ]
    pairs.append(("gpu_fraction", before.gpu_fraction, after.gpu_fraction))
    pairs.append(
        ("kv_cache_tokens", before.estimate.kv_cache_tokens, after.estimate.kv_cache_tokens)
    )
    return tuple(
        Change(setting=setting, before=old, after=new) for setting, old, new in pairs if old != new
    )


def _floor(plan: Plan) -> Floor:
    lowest: float | None = None
    if plan.engine in FILL_THEIR_BUDGET and plan.settings.kv_cache_memory_bytes is None:
        limit_bytes = int(plan.device.total_bytes * plan.gpu_fraction)
        lowest = shares(plan.estimate, plan.device, limit_bytes).lowest
    return Floor(needed_bytes=plan.estimate.needed_bytes, lowest_share=lowest)


def pins(settings: EngineSettings) -> dict[str, object]:
    """What a config would say to get these settings and no others."""
    return {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
    }
