"""Which model goes on which card, and why not on the others. Pure and deterministic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from placement.nodes import Node
from vram.plan import Plan
from vram.units import gib

# Shares are sums of decimals: 0.3 + 0.7 must be a whole card.
SHARE_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A share of one card of one node; no card (-1) for a model on the CPU."""

    node: str
    gpu: int
    share: float


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


@dataclass(slots=True, kw_only=True)
class _Room:
    """What is left of one node while models are placed one after the other."""

    node: Node
    free: list[float]
    cpus: float
    memory_bytes: int
    largest_card_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.largest_card_bytes = max((gpu.total_bytes for gpu in self.node.gpus), default=0)

    def cards(self, plan: Plan) -> list[int]:
        """Cards with enough left for this plan, the fullest first."""
        share = plan.gpu_fraction
        enough = [
            index
            for index, gpu in enumerate(self.node.gpus)
            if self.free[index] >= share - SHARE_TOLERANCE and _suits(plan, gpu.total_bytes)
        ]
        return sorted(enough, key=lambda index: (self.free[index], index))


def place(
    plans: Mapping[str, Plan],
    nodes: Sequence[Node],
    replica_cpus: float = 1.0,
    engine_cpus: float = 1.0,
) -> Placement:
    """Big models first, each on the smallest sufficient cards with the least left over."""
    rooms = [
        _Room(node=node, free=list(node.free), cpus=node.cpus, memory_bytes=node.memory_bytes)
        for node in nodes
    ]
    assignments: list[Assignment] = []
    rejections: list[Rejection] = []
    unplaced: list[str] = []
    for model in sorted(plans, key=lambda name: (*_size(plans[name]), name)):
        plan = plans[model]
        assignment, refused = _place_one(model, plan, rooms, replica_cpus, engine_cpus)
        rejections += refused
        if assignment is None:
            unplaced.append(model)
        else:
            assignments.append(assignment)
    return Placement(
        assignments=tuple(assignments), rejections=tuple(rejections), unplaced=tuple(unplaced)
    )


def _size(plan: Plan) -> tuple[float, ...]:
    share = plan.gpu_fraction if plan.device.kind == "cuda" else 0.0
    return (-plan.settings.num_gpus * share, -plan.estimate.device_use_under_load_bytes)


def _place_one(
    model: str, plan: Plan, rooms: list[_Room], replica_cpus: float, engine_cpus: float
) -> tuple[Assignment | None, list[Rejection]]:
    rejections: list[Rejection] = []
    fitting: list[_Room] = []
    for room in rooms:
        problem = _problem(plan, room, plan.settings.num_gpus, replica_cpus, engine_cpus)
        if problem:
            rejections.append(Rejection(model=model, node=room.node.name, reason=problem))
        else:
            fitting.append(room)
    if fitting:
        best = min(fitting, key=lambda room: _preference(plan, room))
        slots = _take(plan, best, plan.settings.num_gpus, replica_cpus, engine_cpus)
        reason = f"the tightest of {len(fitting)} nodes that have room"
        return Assignment(model=model, slots=tuple(slots), reason=reason), rejections
    if plan.settings.pipeline_parallel_size > 1:
        spread = _spread(plan, rooms, replica_cpus, engine_cpus)
        if spread:
            reason = "one pipeline stage after the other: no single node has room for all"
            return Assignment(model=model, slots=tuple(spread), reason=reason), rejections
    return None, rejections


def _spread(plan: Plan, rooms: list[_Room], replica_cpus: float, engine_cpus: float) -> list[Slot]:
    """Stages over nodes, each tensor-parallel group whole on one; empty when that fails."""
    stage_gpus = plan.settings.tensor_parallel_size
    undo = [(list(room.free), room.cpus, room.memory_bytes) for room in rooms]
    slots: list[Slot] = []
    for stage in range(plan.settings.pipeline_parallel_size):
        extra_cpus = replica_cpus if stage == 0 else 0.0
        fitting = [
            room for room in rooms if not _problem(plan, room, stage_gpus, extra_cpus, engine_cpus)
        ]
        if not fitting:
            for room, (free, cpus, memory_bytes) in zip(rooms, undo, strict=True):
                room.free, room.cpus, room.memory_bytes = free, cpus, memory_bytes
            return []
        # The fewest nodes: first where most stages of this model still have room.
        best = min(fitting, key=lambda room: (-len(room.cards(plan)), _preference(plan, room)))
        slots += _take(plan, best, stage_gpus, extra_cpus, engine_cpus)
    return slots


def _preference(plan: Plan, room: _Room) -> tuple[float, float, str]:
    if plan.device.kind == "cpu":
        return (len(room.node.gpus), room.memory_bytes, room.node.name)
    return (room.largest_card_bytes, sum(room.free), room.node.name)


def _problem(
    plan: Plan, room: _Room, num_gpus: int, replica_cpus: float, engine_cpus: float
) -> str:
    """Why this node has no room; empty when it has."""
    if plan.device.kind == "cpu":
        needed_cpus = replica_cpus + engine_cpus
        needed_bytes = plan.estimate.device_use_under_load_bytes
        if needed_bytes > room.memory_bytes:
            return f"{gib(room.memory_bytes)} of RAM are free, {gib(needed_bytes)} are needed"
    else:
        needed_cpus = replica_cpus + engine_cpus * num_gpus
        suitable = [gpu for gpu in room.node.gpus if _suits(plan, gpu.total_bytes)]
        if not room.node.gpus:
            return "it has no GPU"
        if not suitable:
            return (
                f"its largest GPU has {gib(room.largest_card_bytes)}, "
                f"the plan is for {gib(plan.device.total_bytes)} ({plan.device.name})"
            )
        num_free = len(room.cards(plan))
        if num_free < num_gpus:
            return (
                f"{num_free} of its {len(room.node.gpus)} GPUs have {plan.gpu_fraction:g} free, "
                f"{num_gpus} are needed"
            )
    if needed_cpus > room.cpus + SHARE_TOLERANCE:
        return f"{room.cpus:g} CPUs are free, {needed_cpus:g} are needed"
    return ""


def _suits(plan: Plan, card_bytes: int) -> bool:
    """A plan holds on its own card and on every larger one."""
    return card_bytes >= plan.device.total_bytes


def _take(
    plan: Plan, room: _Room, num_gpus: int, replica_cpus: float, engine_cpus: float
) -> list[Slot]:
    if plan.device.kind == "cpu":
        room.cpus -= replica_cpus + engine_cpus
        room.memory_bytes -= plan.estimate.device_use_under_load_bytes
        return [Slot(node=room.node.name, gpu=-1, share=0.0)]
    taken = room.cards(plan)[:num_gpus]
    for index in taken:
        room.free[index] = max(room.free[index] - plan.gpu_fraction, 0.0)
    room.cpus -= replica_cpus + engine_cpus * num_gpus
    return [Slot(node=room.node.name, gpu=index, share=plan.gpu_fraction) for index in taken]
