"""What somebody asks the planner for: a model, wishes, an objective. Knows no cards."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from vram.gpu import Device
from vram.model import ModelShape
from vram.wishes import Wishes

Objective = Literal["throughput", "latency", "cheapest"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One model. What the wishes pin is kept; `max_gpus` counts for one replica."""

    name: str
    shape: ModelShape = field(repr=False)
    wishes: Wishes = field(default_factory=Wishes)
    engine: str = "vllm"
    objective: Objective = "throughput"
    device: Device | None = None  # the card it has to have, or the CPU's share of RAM
    max_gpus: int | None = None
    num_replicas: int = 1
    replica_cpus: float = 1.0
    engine_cpus: float = 1.0
