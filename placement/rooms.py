"""What is left of every node while models are placed one after the other. Chooses no plan."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from placement.nodes import Node
from vram.gpu import Device
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
class Need:
    """What one replica takes: stages of cards that stay together, CPUs, or RAM."""

    device: Device
    share: float
    stage_gpus: int
    stages: int
    ram_bytes: int
    replica_cpus: float
    engine_cpus: float
    any_larger: bool  # whether a larger card will do as well

    @property
    def num_gpus(self) -> int:
        return self.stage_gpus * self.stages

    @property
    def on_cpu(self) -> bool:
        return self.device.kind == "cpu"

    def suits(self, card: Device) -> bool:
        """A plan holds on its own card and on every larger one."""
        if self.any_larger:
            return card.total_bytes >= self.device.total_bytes
        return card == self.device


def need_of(
    plan: Plan, replica_cpus: float, engine_cpus: float, *, any_larger: bool = True
) -> Need:
    return Need(
        device=plan.device,
        share=plan.gpu_fraction,
        stage_gpus=plan.settings.tensor_parallel_size,
        stages=plan.settings.pipeline_parallel_size,
        ram_bytes=plan.estimate.device_use_under_load_bytes,
        replica_cpus=replica_cpus,
        engine_cpus=engine_cpus,
        any_larger=any_larger,
    )


@dataclass(slots=True, kw_only=True)
class Room:
    """What is left of one node."""

    node: Node
    free: list[float]
    cpus: float
    memory_bytes: int
    largest_card_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.largest_card_bytes = max((gpu.total_bytes for gpu in self.node.gpus), default=0)

    def cards(self, need: Need) -> list[int]:
        """Cards with enough left, the fullest first."""
        least = need.share - SHARE_TOLERANCE
        enough = [
            index
            for index, (gpu, free) in enumerate(zip(self.node.gpus, self.free, strict=True))
            if free >= least and need.suits(gpu)
        ]
        return sorted(enough, key=lambda index: (self.free[index], index))

    def problem(self, need: Need, num_gpus: int, replica_cpus: float) -> str:
        """Why this node has no room for so many cards of it; empty when it has."""
        if need.on_cpu:
            needed_cpus = replica_cpus + need.engine_cpus
            if need.ram_bytes > self.memory_bytes:
                return f"{gib(self.memory_bytes)} of RAM are free, {gib(need.ram_bytes)} are needed"
        else:
            needed_cpus = replica_cpus + need.engine_cpus * num_gpus
            if not self.node.gpus:
                return "it has no GPU"
            num_free = len(self.cards(need))
            if num_free < num_gpus:
                return self._too_few(need, num_free, num_gpus)
        if needed_cpus > self.cpus + SHARE_TOLERANCE:
            return f"{self.cpus:g} CPUs are free, {needed_cpus:g} are needed"
        return ""

    def _too_few(self, need: Need, num_free: int, num_gpus: int) -> str:
        if not any(need.suits(gpu) for gpu in self.node.gpus):
            return (
                f"its largest GPU has {gib(self.largest_card_bytes)}, "
                f"the plan is for {gib(need.device.total_bytes)} ({need.device.name})"
            )
        return (
            f"{num_free} of its {len(self.node.gpus)} GPUs have {need.share:g} free, "
            f"{num_gpus} are needed"
        )

    def take(self, need: Need, num_gpus: int, replica_cpus: float) -> list[Slot]:
        if need.on_cpu:
            self.cpus -= replica_cpus + need.engine_cpus
            self.memory_bytes -= need.ram_bytes
            return [Slot(node=self.node.name, gpu=-1, share=0.0)]
        taken = self.cards(need)[:num_gpus]
        for index in taken:
            self.free[index] = max(round(self.free[index] - need.share, 6), 0.0)
        self.cpus -= replica_cpus + need.engine_cpus * num_gpus
        return [Slot(node=self.node.name, gpu=index, share=need.share) for index in taken]


class Rooms:
    """All nodes, best fit first: the fullest node that has room, so that whole ones stay whole."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._rooms = [
            Room(node=node, free=list(node.free), cpus=node.cpus, memory_bytes=node.memory_bytes)
            for node in sorted(nodes, key=lambda node: node.name)
        ]
        self._of_card: dict[Device, list[Room]] = defaultdict(list)
        for room in self._rooms:
            for device in dict.fromkeys(room.node.gpus):
                self._of_card[device].append(room)

    def take(self, need: Need) -> tuple[tuple[Slot, ...], int]:
        """The slots of one replica and how many nodes had room for all of it; none if none has.

        Stages go over several nodes only when no single one has room, each whole on one of them.
        """
        candidates = self._candidates(need)
        fitting = [
            room for room in candidates if not room.problem(need, need.num_gpus, need.replica_cpus)
        ]
        if fitting:
            best = min(fitting, key=lambda room: _preference(need, room))
            return tuple(best.take(need, need.num_gpus, need.replica_cpus)), len(fitting)
        if need.stages > 1:
            return tuple(self._spread(need, candidates)), 0
        return (), 0

    def give_back(self, need: Need, slots: Iterable[Slot]) -> None:
        by_name = {room.node.name: room for room in self._rooms}
        for number, slot in enumerate(slots):
            room = by_name[slot.node]
            room.cpus += need.engine_cpus + (need.replica_cpus if number == 0 else 0.0)
            if slot.gpu < 0:
                room.memory_bytes += need.ram_bytes
            else:
                room.free[slot.gpu] = round(room.free[slot.gpu] + slot.share, 6)

    def take_again(self, need: Need, slots: Iterable[Slot]) -> None:
        """What has just been given back."""
        by_name = {room.node.name: room for room in self._rooms}
        for number, slot in enumerate(slots):
            room = by_name[slot.node]
            room.cpus -= need.engine_cpus + (need.replica_cpus if number == 0 else 0.0)
            if slot.gpu < 0:
                room.memory_bytes -= need.ram_bytes
            else:
                room.free[slot.gpu] = round(room.free[slot.gpu] - slot.share, 6)

    def most(self, need: Need) -> int:
        """Cards that one node could give it now; of several stages, stages on all nodes."""
        cards = [len(room.cards(need)) for room in self._candidates(need)]
        if need.stages > 1:
            return sum(number // need.stage_gpus for number in cards)
        return max(cards, default=0)

    def full(self, need: Need) -> tuple[tuple[str, int], ...]:
        """Of the nodes with such cards: why some have no room, and how many say the same."""
        problems = (
            room.problem(need, need.num_gpus, need.replica_cpus) for room in self._candidates(need)
        )
        return tuple(Counter(problem for problem in problems if problem).most_common())

    def problems(self, need: Need) -> Iterable[tuple[str, str]]:
        """Each node that has no room, by name, and why."""
        for room in self._rooms:
            problem = room.problem(need, need.num_gpus, need.replica_cpus)
            if problem:
                yield room.node.name, problem

    def _candidates(self, need: Need) -> list[Room]:
        if need.on_cpu or need.any_larger:
            return self._rooms
        return self._of_card.get(need.device, [])

    def _spread(self, need: Need, candidates: list[Room]) -> list[Slot]:
        undo = [(list(room.free), room.cpus, room.memory_bytes) for room in candidates]
        slots: list[Slot] = []
        for stage in range(need.stages):
            replica_cpus = need.replica_cpus if stage == 0 else 0.0
            fitting = [
                room for room in candidates if not room.problem(need, need.stage_gpus, replica_cpus)
            ]
            if not fitting:
                for room, (free, cpus, memory_bytes) in zip(candidates, undo, strict=True):
                    room.free, room.cpus, room.memory_bytes = free, cpus, memory_bytes
                return []
            # The fewest nodes: first where most stages of this model still have room.
            best = min(fitting, key=lambda room: (-len(room.cards(need)), _preference(need, room)))
            slots += best.take(need, need.stage_gpus, replica_cpus)
        return slots


def _preference(need: Need, room: Room) -> tuple[float, float, str]:
    if need.on_cpu:
        return (len(room.node.gpus), room.memory_bytes, room.node.name)
    return (room.largest_card_bytes, sum(room.free), room.node.name)
