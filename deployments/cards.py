"""The cards of a placement group: which they are, where, and what is free on them."""

import asyncio
from dataclasses import dataclass
from typing import Any

import psutil
import structlog

from vram.plan import Plan
from vram.units import GIB, gib

# A dead process's memory is back within a second or two of its end; a busy driver takes longer.
_BACK_S = 30.0
_SLACK_BYTES = GIB // 4

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One GPU bundle's card, as its node numbers it."""

    node_id: str
    index: int
    free_bytes: int


async def cards_of(placement_group: Any) -> tuple[Card, ...]:
    """The cards of the group's GPU bundles, in their order."""
    return await asyncio.to_thread(_ask, placement_group)


async def available_bytes(plan: Plan, placement_group: Any, *, expected_bytes: int = 0) -> int:
    """How much of its card a model may take now: what is free, at most its share.

    Waits a while for `expected_bytes`, which were free before a life of the engine that has ended.
    """
    share_bytes = int(plan.device.total_bytes * plan.gpu_fraction)
    if plan.device.kind == "cpu":
        return min(share_bytes, psutil.virtual_memory().available)
    expected_bytes = min(share_bytes, expected_bytes) - _SLACK_BYTES
    deadline_s = asyncio.get_running_loop().time() + _BACK_S
    while True:
        free_bytes = min(card.free_bytes for card in await cards_of(placement_group))
        if free_bytes >= expected_bytes:
            return min(share_bytes, free_bytes)
        if asyncio.get_running_loop().time() > deadline_s:
            log.warning("memory_not_back", free=gib(free_bytes), expected=gib(expected_bytes))
            return min(share_bytes, free_bytes)
        await asyncio.sleep(0.5)


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
        memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index))
        node_id = ray.get_runtime_context().get_node_id()
        return Card(node_id=node_id, index=index, free_bytes=int(memory.free))
    finally:
        pynvml.nvmlShutdown()
