"""What a model is loaded on: a graphics card, or a share of a machine's RAM. Asks no driver."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from vram.errors import Invalid
from vram.units import gib_to_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or the share of RAM that stands in for one."""

    name: str
    total_bytes: int
    kind: Literal["cuda", "cpu"]
    bfloat16: bool = True
    float8: bool = True

    def __post_init__(self) -> None:
        if self.total_bytes <= 0:
            raise Invalid(f"{self.name} has no memory: {self.total_bytes} bytes", "device")


# Totals as the driver reports them to torch (total_memory), which is what vLLM's fraction is of:
# the printed capacity less what the driver and ECC keep.
# H200 139.80: evidence/vllm_h200.jsonl. H100-80GB 79.19: llm-d-planner (reference/peers.md 6).
# The others: torch's "total capacity of … GiB" in public out-of-memory reports (2024 to 2026),
# the smallest seen; they differ by 0.1 GiB with driver and ECC, so a live inventory replaces them.
CARDS_GIB = {
    "T4": 14.56,
    "V100-16GB": 15.77,
    "V100-32GB": 31.73,
    "A10G": 22.05,
    "L4": 22.03,
    "RTX3090": 23.69,
    "RTX4090": 23.64,
    "RTX5090": 31.36,
    "A100-40GB": 39.38,
    "A100-80GB": 79.15,
    "L40S": 44.39,
    "A6000": 47.40,
    "H100-80GB": 79.19,
    "H200": 139.80,
    "RTXPRO6000": 94.97,
    "B200": 178.35,
    "GB200": 184.31,
}

# Other names of the same cards: Ray's accelerator_type, NVML's product names, habits.
CARD_ALIASES = {
    "V100": "V100-16GB",
    "A100": "A100-40GB",
    "A100-40G": "A100-40GB",
    "A100-80G": "A100-80GB",
    "H100": "H100-80GB",
    "H100-80G": "H100-80GB",
    "H200-141GB": "H200",
    "RTX-4090": "RTX4090",
    "4090": "RTX4090",
    "RTX-3090": "RTX3090",
    "RTX-5090": "RTX5090",
    "RTX-A6000": "A6000",
    "RTX-PRO-6000": "RTXPRO6000",
}

# Below compute capability 8.0 there is no bfloat16.
WITHOUT_BFLOAT16 = frozenset({"T4", "V100-16GB", "V100-32GB"})
# Below 8.9 there is no arithmetic in 8-bit floats.
WITHOUT_FLOAT8 = WITHOUT_BFLOAT16 | {"A10G", "RTX3090", "A100-40GB", "A100-80GB", "A6000"}


# Product names say maker, form factor and memory in many ways; these parts name no other card.
NOISE = re.compile(
    r"\b(NVIDIA|TESLA|GEFORCE|SXM\d?|PCIE?|HBM\w*|GENERATION|BLACKWELL|SERVER|WORKSTATION|EDITION)\b"
)


def device_named(name: str) -> Device:
    """A well-known card by its name: H200, A100-80G, "RTX 4090", "NVIDIA H100 80GB HBM3"."""
    wanted = "-".join(NOISE.sub(" ", re.sub("[-_]", " ", name.upper())).split())
    card = CARD_ALIASES.get(wanted, wanted)
    if card not in CARDS_GIB:
        raise Invalid(f"Unknown GPU {name!r}; known are {', '.join(CARDS_GIB)}.", "gpus")
    return Device(
        name=card,
        total_bytes=gib_to_bytes(CARDS_GIB[card]),
        kind="cuda",
        bfloat16=card not in WITHOUT_BFLOAT16,
        float8=card not in WITHOUT_FLOAT8,
    )


def cpu_device(memory_bytes: int) -> Device:
    """The share of RAM that a model on the CPU may take, as if it were a card."""
    if not math.isfinite(memory_bytes):
        raise Invalid(f"{memory_bytes} is not a number of bytes", "memory")
    return Device(name="CPU", total_bytes=int(memory_bytes), kind="cpu", float8=False)
