"""Chooses cards and settings for many models at once. Pure; the same input, the same plan."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from placement.errors import NoRoom
from placement.kinds import CardKind, card_kinds
from placement.menu import Menu, menu, wishes_of
from placement.nodes import Node
from placement.options import Option
from placement.requests import Request
from placement.rooms import Need, Rooms, Slot, need_of
from placement.splits import splits
from vram.errors import BallastError, Invalid
from vram.plan import Plan, plan, why_not
from vram.units import gib

# Large models first; then, if somebody is left out, those first; small models first at last.
ATTEMPTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """One replica: its plan, its cards, and how many nodes had room for it (0: stages spread)."""

    request: Request
    replica: int
    plan: Plan
    slots: tuple[Slot, ...]
    num_fitting_nodes: int
    full_nodes: tuple[tuple[str, int], ...]  # why nodes with such cards had none, and how many
    option: Option | None  # None on the CPU
    passed_over: tuple[Option, ...]  # better ones, for which there was no room


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplaced:
    """One replica for which there is no card, or no room."""

    request: Request
    replica: int
    error: BallastError


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Where every replica goes; in the order of the requests."""

    placed: tuple[Placed, ...]
    unplaced: tuple[Unplaced, ...]
    menus: Mapping[str, Menu]
    kinds: tuple[CardKind, ...]

    @property
    def fits(self) -> bool:
        return not self.unplaced


@dataclass(frozen=True, slots=True, kw_only=True)
class _Replica:
    request: Request
    index: int

    @property
    def key(self) -> tuple[str, int]:
        return self.request.name, self.index


@dataclass(frozen=True, slots=True, kw_only=True)
class _Taken:
    """What one replica got: which of its options, where, and how it was elsewhere."""

    number: int
    need: Need
    slots: tuple[Slot, ...]
    num_fitting: int
    full_nodes: tuple[tuple[str, int], ...]


@dataclass(slots=True, kw_only=True)
class _Round:
    """One attempt to place everybody: what each got, and which of its options that was."""

    rooms: Rooms
    taken: dict[tuple[str, int], _Taken] = field(default_factory=dict)
    left_out: list[_Replica] = field(default_factory=list)


def choose(requests: Sequence[Request], nodes: Sequence[Node]) -> Decision:
    """Every model on its best option for which there is room; the large ones choose first.

    Raises Invalid for a wish that no card could meet.
    """
    kinds = card_kinds(nodes)
    _check(requests, kinds)
    menus = {request.name: _menu(request, kinds) for request in requests}
    replicas = [
        _Replica(request=request, index=index)
        for request in sorted(requests, key=lambda request: _urgency(request, menus[request.name]))
        for index in range(request.num_replicas)
        if menus[request.name].options
    ]
    found = _best_round(replicas, menus, nodes)
    placed: list[Placed] = []
    unplaced: list[Unplaced] = []
    for request in requests:
        for index in range(request.num_replicas):
            taken = found.taken.get((request.name, index))
            if taken is None:
                error = _no_room(request, menus[request.name], kinds, found.rooms)
                unplaced.append(Unplaced(request=request, replica=index, error=error))
                continue
            number = taken.number
            options = menus[request.name].options
            placed.append(
                Placed(
                    request=request,
                    replica=index,
                    plan=options[number].plan,
                    slots=taken.slots,
                    num_fitting_nodes=taken.num_fitting,
                    full_nodes=taken.full_nodes,
                    option=options[number] if options[number].plan.device.kind == "cuda" else None,
                    passed_over=options[:number],
                )
            )
    return Decision(placed=tuple(placed), unplaced=tuple(unplaced), menus=menus, kinds=kinds)


def best_plan(request: Request, nodes: Sequence[Node]) -> Plan:
    """The plan of one model with the whole inventory to itself; raises what is wrong otherwise."""
    decision = choose([request], nodes)
    if decision.unplaced:
        raise decision.unplaced[0].error
    return decision.placed[0].plan


def _check(requests: Sequence[Request], kinds: Sequence[CardKind]) -> None:
    names = [request.name for request in requests]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Invalid(f"two models have the name {twice!r}; give one another name", "name")
    wants_card = [r.name for r in requests if r.device is None or r.device.kind == "cuda"]
    if wants_card and not kinds:
        raise Invalid(
            f"the inventory has no GPU, and {wants_card[0]} needs one: name cards with --gpus "
            '"2x8xH200", or plan it for device.kind: cpu',
            "gpus",
        )


def _menu(request: Request, kinds: Sequence[CardKind]) -> Menu:
    if request.device is None or request.device.kind == "cuda":
        return menu(request, kinds)
    # On the CPU there is one way: the RAM that it was given.
    try:
        found = plan(request.shape, request.wishes, request.device, request.engine, request.name)
    except Invalid:
        return Menu(options=(), refused=())
    kind = CardKind(device=request.device, most_on_a_node=1, total=1, nvlink=False)
    option = Option(plan=found, kind=kind, comfortable=True, fp8_cache=False)
    return Menu(options=(option,), refused=())


def _urgency(request: Request, found: Menu) -> tuple[float, float, int, str]:
    """Who chooses first: many cards on one node, much memory, few kinds of cards to choose from."""
    if not found.options:
        return (0, 0, 0, request.name)
    smallest = min(found.options, key=lambda option: option.card_bytes)
    kinds = {option.kind.device for option in found.options}
    together = smallest.plan.settings.tensor_parallel_size
    return (-together, -smallest.card_bytes, len(kinds), request.name)


def _best_round(
    replicas: list[_Replica], menus: Mapping[str, Menu], nodes: Sequence[Node]
) -> _Round:
    """Everybody's best option; where that leaves some out, the smallest ones, then better again.

    Of several attempts the first that leaves out the fewest.
    """
    best = _round(replicas, menus, nodes, thrifty=False)
    order = replicas
    for attempt in range(ATTEMPTS):
        if attempt > 0:
            first = {replica.key for replica in best.left_out}
            order = sorted(replicas, key=lambda replica: replica.key not in first)
        if attempt == ATTEMPTS - 1:
            order = replicas[::-1]  # the small ones first
        for thrifty in (False, True):
            if not best.left_out:
                return best
            tried = _round(order, menus, nodes, thrifty=thrifty)
            if len(tried.left_out) < len(best.left_out):
                best = tried
    return best


def _round(
    order: Sequence[_Replica], menus: Mapping[str, Menu], nodes: Sequence[Node], *, thrifty: bool
) -> _Round:
    this = _Round(rooms=Rooms(nodes))
    for replica in order:
        numbers = list(range(len(menus[replica.request.name].options)))
        if thrifty:
            options = menus[replica.request.name].options
            numbers.sort(key=lambda number: (options[number].card_bytes, number))
        if not _take_first(this, replica, menus, numbers):
            this.left_out.append(replica)
    if thrifty:
        for replica in order:
            _upgrade(this, replica, menus)
    return this


def _take_first(
    this: _Round, replica: _Replica, menus: Mapping[str, Menu], numbers: Iterable[int]
) -> bool:
    request = replica.request
    for number in numbers:
        option = menus[request.name].options[number]
        need = need_of(option.plan, request.replica_cpus, request.engine_cpus, any_larger=False)
        full_nodes = this.rooms.full(need)
        slots, num_fitting = this.rooms.take(need)
        if slots:
            this.taken[replica.key] = _Taken(
                number=number,
                need=need,
                slots=slots,
                num_fitting=num_fitting,
                full_nodes=full_nodes,
            )
            return True
    return False


def _upgrade(this: _Round, replica: _Replica, menus: Mapping[str, Menu]) -> None:
    """What the thrifty left over goes to those whose better options fit into it."""
    if replica.key not in this.taken:
        return
    taken = this.taken[replica.key]
    if taken.number == 0:
        return
    this.rooms.give_back(taken.need, taken.slots)
    if not _take_first(this, replica, menus, range(taken.number)):
        this.rooms.take_again(taken.need, taken.slots)


def _no_room(
    request: Request, found: Menu, kinds: Sequence[CardKind], rooms: Rooms
) -> BallastError:
    if not found.options:
        return _fits_nowhere(request, kinds)
    smallest = min(found.options, key=lambda option: option.card_bytes)
    need = need_of(smallest.plan, request.replica_cpus, request.engine_cpus, any_larger=False)
    if need.on_cpu:
        why = next((f"{node}: {why}" for node, why in rooms.problems(need)), "there is no node")
        return Invalid(
            f"{request.name} on the CPU needs {gib(need.ram_bytes)} of RAM, and no node has it "
            f"({why}): lower device.memory_gib",
            "memory_gib",
        )
    return NoRoom(
        request.name, need.num_gpus, need.stages, need.share, need.device.name, rooms.most(need)
    )


def _fits_nowhere(request: Request, kinds: Sequence[CardKind]) -> BallastError:
    """On the largest cards and the widest split that it may have."""
    device, wishes = request.device, wishes_of(request)
    if device is None or device.kind == "cuda":
        wanted = [kind for kind in kinds if device is None or kind.device.name == device.name]
        if device is not None and not wanted:
            here = ", ".join(f"{kind.total} x {kind.device.name}" for kind in kinds)
            return Invalid(
                f"{request.name} asks for {device.name}, and the inventory has {here}: change "
                "device.name, or remove it to leave the card to the plan",
                "device.name",
            )
        largest = max(wanted, key=lambda kind: kind.device.total_bytes * kind.most_on_a_node)
        device = largest.device
        tensor, pipeline = (splits(request, largest) or [(1, wishes.pipeline_parallel_size or 1)])[
            -1
        ]
        wishes = replace(wishes, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
    try:
        return why_not(request.shape, wishes, device, request.engine, request.name)
    except Invalid as error:
        return error
