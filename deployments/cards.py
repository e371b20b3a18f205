"""The cards of a placement group: which they are, where, what is free and who holds the rest."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import structlog

from deployments.processes import state_of
from vram.plan import Plan
from vram.units import GIB, gib

_SLACK_BYTES = GIB // 4

log = structlog.get_logger(__name__)


_NAMED_HOLDERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process that holds memory which a model could use."""

    process_id: int
    name: str
    held_bytes: int

    def __str__(self) -> str:
        return f"{self.name} (process {self.process_id}) holds {gib(self.held_bytes)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Available:
    """What a model may take now, and the largest of those who hold the rest."""

    free_bytes: int
    holders: tuple[Holder, ...] = ()
    cards: tuple["Card", ...] = field(default=(), compare=False)

    @property
    def held_by(self) -> str:
        return "; ".join(map(str, self.holders)) or "no process that can be seen from here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One GPU bundle's card, as its node numbers it."""

    node_id: str
    index: int
    free_bytes: int
    holders: tuple[Holder, ...] = ()


async def cards_of(placement_group: Any) -> tuple[Card, ...]:
    """The cards of the group's GPU bundles, in their order."""
    return await asyncio.to_thread(_ask, placement_group)


async def available(
    plan: Plan, placement_group: Any, *, expected_bytes: int = 0, back_s: float
) -> Available:
    """How much of its card a model may take now: what is free, at most its share.

    Waits up to `back_s` for `expected_bytes`, which were free before a life of the engine that has
    ended: a driver gives memory back a second or two after its process is gone.
    """
    share_bytes = int(plan.device.total_bytes * plan.gpu_fraction)
    if plan.device.kind == "cpu":  # memory of a process that is gone is free
        free_bytes = min(share_bytes, psutil.virtual_memory().available)
        return Available(free_bytes=free_bytes, holders=await asyncio.to_thread(_in_memory))
    expected_bytes = min(share_bytes, expected_bytes) - _SLACK_BYTES
    deadline_s = asyncio.get_running_loop().time() + back_s
    while True:
        cards = await cards_of(placement_group)
        card = min(cards, key=lambda card: card.free_bytes)
        found = Available(
            free_bytes=min(share_bytes, card.free_bytes),
            holders=largest(card.holders),
            cards=cards,
        )
        if card.free_bytes >= expected_bytes:
            return found
        if asyncio.get_running_loop().time() > deadline_s:
            log.error(
                "memory_not_back", free=gib(card.free_bytes), expected=gib(expected_bytes),
                waited_s=back_s, held_by=found.held_by,
            )  # fmt: skip
            return found
        await asyncio.sleep(0.5)


def largest(holders: Iterable[Holder]) -> tuple[Holder, ...]:
    """The few that are worth a name."""
    ordered = sorted(holders, key=lambda holder: holder.held_bytes, reverse=True)
    return tuple(ordered[:_NAMED_HOLDERS])


def free_here(cards: Sequence[Card], node_id: str) -> int | None:
    """What the fullest has free now; None if one is elsewhere.

    Without a task in their bundles: an engine that serves may hold those.
    """
    import pynvml

    if not cards or any(card.node_id != node_id for card in cards):
        return None
    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(card.index) for card in cards]
        return min(int(pynvml.nvmlDeviceGetMemoryInfo(handle).free) for handle in handles)
    finally:
        pynvml.nvmlShutdown()


def _in_memory() -> tuple[Holder, ...]:
    """Who holds the RAM of this node."""
    found = psutil.process_iter(["name", "memory_info"])
    return largest(
        Holder(process_id=p.pid, name=p.info["name"], held_bytes=p.info["memory_info"].rss)
        for p in found
        if p.info["memory_info"] is not None
    )


def _ask(placement_group: Any) -> tuple[Card, ...]:
    """The replica holds no card itself: ask a task in each bundle that does."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    answers = []
    for index, bundle in enumerate(placement_group.bundle_specs):
        if not bundle.get("GPU"):
            continue
        strategy = PlacementGroupSchedulingStrategy(
            placement_group, placement_group_bundle_index=index
        )
        ask = ray.remote(num_cpus=0, num_gpus=bundle["GPU"], scheduling_strategy=strategy)(_card)
        answers.append(ask.remote())
    return tuple(ray.get(answers, timeout=60))


def _card() -> Card:
    """Runs in a bundle: the card that Ray has given it."""
    import pynvml
    import ray

    pynvml.nvmlInit()
    try:
        index = int(ray.get_gpu_ids()[0])
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return Card(
            node_id=ray.get_runtime_context().get_node_id(),
            index=index,
            free_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).free),
            holders=holders_of(handle),
        )
    finally:
        pynvml.nvmlShutdown()


def holders_of(handle: Any) -> tuple[Holder, ...]:
    """Whose memory a card holds, as its driver tells it; a virtual card's tells of nobody."""
    import pynvml

    try:
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return ()
    return tuple(
        Holder(
            process_id=process.pid,
            name=state_of(process.pid)[1] or "a process of another container",
            held_bytes=int(process.usedGpuMemory or 0),
        )
        for process in running
    )
