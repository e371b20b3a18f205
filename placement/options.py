"""One way in which a model could run on one kind of card, or why it can't."""

from dataclasses import dataclass

from placement.kinds import CardKind
from vram.gpu import Device
from vram.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A plan on one kind of card; `card_bytes` is what it takes of all its cards."""

    plan: Plan
    kind: CardKind
    comfortable: bool  # the context that was asked for, or a long one
    fp8_cache: bool  # which nobody asked for

    @property
    def num_gpus(self) -> int:
        return self.plan.settings.num_gpus

    @property
    def card_bytes(self) -> int:
        return round(self.num_gpus * self.plan.gpu_fraction * self.plan.device.total_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A card and a split on which it does not fit. Bytes per GPU; `problem` for other reasons."""

    device: Device
    tensor_parallel_size: int
    pipeline_parallel_size: int
    needed_bytes: int = 0
    available_bytes: int = 0
    problem: str = ""
