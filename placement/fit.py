"""Which plan goes on which card, and why not on the others. Pure and deterministic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from placement.nodes import Node
from placement.rooms import Rooms, Slot, need_of
from vram.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Where one model goes, and why there."""

    model: str
    slots: tuple[Slot, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Why one model does not go to one node."""

    model: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The whole answer; `unplaced` names the models for which there is no room."""

    assignments: tuple[Assignment, ...]
    rejections: tuple[Rejection, ...]
    unplaced: tuple[str, ...]


def place(
    plans: Mapping[str, Plan],
    nodes: Sequence[Node],
    replica_cpus: float = 1.0,
    engine_cpus: float = 1.0,
) -> Placement:
    """Big models first, each on the smallest sufficient cards with the least left over."""
    rooms = Rooms(nodes)
    assignments: list[Assignment] = []
    rejections: list[Rejection] = []
    unplaced: list[str] = []
    for model in sorted(plans, key=lambda name: (*_size(plans[name]), name)):
        need = need_of(plans[model], replica_cpus, engine_cpus)
        rejections += [
            Rejection(model=model, node=node, reason=problem)
            for node, problem in rooms.problems(need)
        ]
        slots, num_fitting = rooms.take(need)
        if slots:
            reason = why_there(num_fitting)
            assignments.append(Assignment(model=model, slots=slots, reason=reason))
        else:
            unplaced.append(model)
    return Placement(
        assignments=tuple(assignments), rejections=tuple(rejections), unplaced=tuple(unplaced)
    )


def why_there(num_fitting: int) -> str:
    """In words: `num_fitting` nodes had room for all of it; 0 for stages over several."""
    if num_fitting:
        return f"the tightest of {num_fitting} nodes that have room"
    return "one pipeline stage after the other: no single node has room for all"


def _size(plan: Plan) -> tuple[float, ...]:
    share = plan.gpu_fraction if plan.device.kind == "cuda" else 0.0
    return (-plan.settings.num_gpus * share, -plan.estimate.device_use_under_load_bytes)
