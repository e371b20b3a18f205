"""An inventory as a file, YAML or JSON: the nodes of a cluster, for a plan on a laptop."""

import math
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.yaml_file import load_yaml, sentence
from placement.nodes import UNKNOWN_RAM_BYTES, Node
from placement.words import MOST_GPUS
from vram.errors import Invalid
from vram.gpu import WITHOUT_BFLOAT16, WITHOUT_FLOAT8, Device, device_named
from vram.units import GIB, gib_to_bytes


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Cards(_Strict):
    """Equal cards of one node. `memory_gib` is what programs can have of each, if it is known."""

    card: str = Field(min_length=1, max_length=60)
    count: int = Field(1, ge=1, le=MOST_GPUS)
    memory_gib: float | None = Field(None, gt=0, le=1 << 20)
    free: float = Field(1.0, ge=0, le=1)

    def device(self) -> Device:
        if self.memory_gib is None:
            return device_named(self.card)
        name = self.card
        with suppress(Invalid):  # a card that we do not know has a size all the same
            name = device_named(self.card).name
        return Device(
            name=name,
            total_bytes=gib_to_bytes(self.memory_gib),
            kind="cuda",
            bfloat16=name not in WITHOUT_BFLOAT16,
            float8=name not in WITHOUT_FLOAT8,
        )


class NodeEntry(_Strict):
    """One node, or `count` of them."""

    name: str | None = Field(None, min_length=1, max_length=100)
    count: int = Field(1, ge=1, le=MOST_GPUS)
    gpus: list[Cards] = Field(default_factory=list)
    cpus: float | None = Field(None, ge=0)
    memory_gib: float | None = Field(None, ge=0, le=1 << 30)
    nvlink: bool | None = None


class InventoryFile(_Strict):
    nodes: list[NodeEntry] = Field(min_length=1)


def read_inventory_file(path: Path) -> tuple[Node, ...]:
    """Raises `Invalid` with one sentence that names the file, the place and what to change."""
    try:
        return _nodes(InventoryFile.model_validate(_load(path)))
    except ValidationError as error:
        raise Invalid(f"{path}: {sentence(error)}", "inventory") from None
    except Invalid as error:
        raise Invalid(f"{path}: {error}", "inventory") from None


def _load(path: Path) -> object:
    document: object = load_yaml(path)
    if not isinstance(document, dict):
        raise Invalid("an inventory is a mapping with `nodes:`")
    return document


def _nodes(inventory: InventoryFile) -> tuple[Node, ...]:
    num_nodes = sum(entry.count for entry in inventory.nodes)
    num_gpus = sum(
        entry.count * sum(card.count for card in entry.gpus) for entry in inventory.nodes
    )
    if num_gpus == 0:
        raise Invalid("it has no GPU: give a node `gpus: [{card: H200, count: 8}]`")
    if max(num_gpus, num_nodes) > MOST_GPUS:
        raise Invalid(
            f"it has {num_gpus} GPUs on {num_nodes} nodes; at most {MOST_GPUS} are planned"
        )
    nodes: list[Node] = []
    for entry in inventory.nodes:
        nodes += _of_entry(entry, len(nodes))
    names = {node.name for node in nodes}
    if len(names) < len(nodes):
        raise Invalid("two nodes have the same name; give one another name")
    return tuple(nodes)


def _of_entry(entry: NodeEntry, first: int) -> list[Node]:
    devices = [(cards.device(), cards) for cards in entry.gpus]
    gpus = tuple(device for device, cards in devices for _ in range(cards.count))
    free = tuple(cards.free for _, cards in devices for _ in range(cards.count))
    stem = entry.name or (gpus[0].name.lower() if gpus else "node")
    one = entry.name is not None and entry.count == 1
    return [
        Node(
            name=stem if one else f"{stem}-{first + index}",
            gpus=gpus,
            free=free,
            cpus=math.inf if entry.cpus is None else entry.cpus,
            memory_bytes=UNKNOWN_RAM_BYTES
            if entry.memory_gib is None
            else int(entry.memory_gib * GIB),
            nvlink=entry.nvlink,
        )
        for index in range(entry.count)
    ]
