"""The kinds of cards in an inventory: what a model can be planned for. Knows no models."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from placement.nodes import Node
from vram.gpu import CARDS_GIB, Device, device_named

# Cards whose usual boards talk over NVLink; an inventory that knows better says so.
NVLINK_CARDS = frozenset(
    {"V100-16GB", "V100-32GB", "A100-40GB", "A100-80GB", "H100-80GB", "H200", "B200", "GB200"}
)
# Where nobody says how many cards a node has: a server with eight.
USUAL_CARDS_PER_NODE = 8
SLICE = " MIG "
# Two makes of 80 GB differ by less.
CLEARLY_SMALLER = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class CardKind:
    """Equal cards, wherever they are."""

    device: Device
    most_on_a_node: int
    total: int
    nvlink: bool

    @property
    def is_slice(self) -> bool:
        """A part of a card that its driver has cut: NCCL joins no two of them."""
        return is_slice(self.device)


def is_slice(device: Device) -> bool:
    return SLICE in device.name


def card_kinds(nodes: Iterable[Node]) -> tuple[CardKind, ...]:
    """The kinds, the smallest memory first; cards of which nothing is free count as well."""
    most: Counter[Device] = Counter()
    total: Counter[Device] = Counter()
    slow: set[Device] = set()
    for node in nodes:
        for device, number in Counter(node.gpus).items():
            most[device] = max(most[device], number)
            total[device] += number
            if not _has_nvlink(node, device):
                slow.add(device)
    kinds = (
        CardKind(
            device=device,
            most_on_a_node=most[device],
            total=total[device],
            nvlink=device not in slow,
        )
        for device in total
    )
    return tuple(sorted(kinds, key=lambda kind: (kind.device.total_bytes, kind.device.name)))


def usual_nodes(device: Device, max_gpus: int | None) -> tuple[Node, ...]:
    """Where there is no inventory: servers with eight such cards, as many as are asked for."""
    num_nodes = -(-(max_gpus or USUAL_CARDS_PER_NODE) // USUAL_CARDS_PER_NODE)
    return tuple(
        Node(
            name=f"{device.name.lower()}-{index}",
            gpus=(device,) * USUAL_CARDS_PER_NODE,
            free=(1.0,) * USUAL_CARDS_PER_NODE,
            cpus=math.inf,
        )
        for index in range(num_nodes)
    )


def next_smaller(device: Device, kinds: Sequence[CardKind]) -> Device | None:
    """The largest card below this one: of the inventory, else of all that are known."""
    here = [kind.device for kind in kinds if not kind.is_slice]
    known = [device_named(name) for name in CARDS_GIB]
    for cards in (here, known):
        smaller = [
            card for card in cards if card.total_bytes < CLEARLY_SMALLER * device.total_bytes
        ]
        if smaller:
            return max(smaller, key=lambda card: (card.total_bytes, card.name))
    return None


def _has_nvlink(node: Node, device: Device) -> bool:
    if node.nvlink is not None:
        return node.nvlink
    return device.name in NVLINK_CARDS
