"""How much of its card a model may take now: what is free, at most its share."""

import asyncio
from typing import Any

import psutil

from vram.plan import Plan


async def available_bytes(plan: Plan, placement_group: Any) -> int:
    """On a GPU the least that is free on one of the placement group's cards, measured there."""
    share_bytes = int(plan.device.total_bytes * plan.gpu_fraction)
    if plan.device.kind == "cpu":
        return min(share_bytes, psutil.virtual_memory().available)
    return min(share_bytes, await asyncio.to_thread(_least_free, plan, placement_group))


def _least_free(plan: Plan, placement_group: Any) -> int:
    """The replica holds no GPU itself: ask a task in each bundle that does."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    probes = []
    for index, bundle in enumerate(placement_group.bundle_specs):
        if not bundle.get("GPU"):
            continue
        strategy = PlacementGroupSchedulingStrategy(
            placement_group, placement_group_bundle_index=index
        )
        probe = ray.remote(num_cpus=0, num_gpus=bundle["GPU"], scheduling_strategy=strategy)(_free)
        probes.append(probe.remote())
    return min(ray.get(probes, timeout=60))


def _free() -> int:
    """Free bytes of the first card that this process was given."""
    import pynvml
    import ray

    pynvml.nvmlInit()
    try:
        card = str(ray.get_gpu_ids()[0])
        handle = (
            pynvml.nvmlDeviceGetHandleByIndex(int(card))
            if card.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(card)
        )
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    finally:
        pynvml.nvmlShutdown()
