"""The machines that models are placed on, as values."""

from dataclasses import dataclass

from vram.errors import Invalid
from vram.gpu import Device

# Of a node whose RAM nobody has told: it never stands in the way.
UNKNOWN_RAM_BYTES = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine: its cards, how much of each is free, and the rest of it."""

    name: str
    gpus: tuple[Device, ...]
    free: tuple[float, ...]  # of each card, 0 to 1
    cpus: float
    memory_bytes: int = 0  # free RAM, for models on the CPU
    nvlink: bool | None = None  # between its cards; None: as usual for such cards
    label: str = ""  # Ray's accelerator_type of its cards

    def __post_init__(self) -> None:
        if len(self.gpus) != len(self.free):
            raise Invalid(
                f"{self.name} has {len(self.gpus)} GPUs and {len(self.free)} free shares", "gpus"
            )
