"""A plan as Ray's placement group bundles. Knows the words of Ray, not Ray."""

from dataclasses import dataclass

from vram.errors import Invalid
from vram.plan import Plan

# Ray's way of asking for a kind of card: a little of a resource of which a node has 1.
LABEL_SHARE = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundles:
    """What goes into options(placement_group_bundles=…, placement_group_strategy=…)."""

    bundles: tuple[dict[str, float], ...]
    strategy: str


def bundles(
    plan: Plan, replica_cpus: float = 1.0, engine_cpus: float = 1.0, card_label: str = ""
) -> Bundles:
    """The replica's bundle first, then one for each GPU, or one with RAM on the CPU.

    `card_label` is Ray's accelerator_type of the card, where a cluster has several kinds.
    """
    for setting, cpus in (("replica_cpus", replica_cpus), ("engine_cpus", engine_cpus)):
        if not 0 <= cpus < 1 << 20:
            raise Invalid(f"{setting} is {cpus}; it is 0 or more", setting)
    replica = {"CPU": float(replica_cpus)}
    if plan.device.kind == "cpu":
        memory_bytes = plan.estimate.device_use_under_load_bytes
        engine = {"CPU": float(engine_cpus), "memory": float(memory_bytes)}
        return Bundles(bundles=(replica, engine), strategy="STRICT_PACK")
    settings = plan.settings
    if plan.gpu_fraction < 1 and settings.num_gpus > 1:
        raise Invalid(
            f"gpu_fraction {plan.gpu_fraction} with {settings.num_gpus} GPUs: "
            "two bundles could land on one card",
            "gpu_fraction",
        )
    engine = {"CPU": float(engine_cpus), "GPU": float(plan.gpu_fraction)}
    if card_label:
        engine[f"accelerator_type:{card_label}"] = LABEL_SHARE
    # A tensor-parallel group talks at every layer and stays on one node; stages may spread.
    strategy = "STRICT_PACK" if settings.pipeline_parallel_size == 1 else "PACK"
    return Bundles(
        bundles=(replica, *(dict(engine) for _ in range(settings.num_gpus))), strategy=strategy
    )
