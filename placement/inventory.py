"""The live Ray cluster as nodes. The only file of this package that talks to Ray."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from placement.nodes import Node
from placement.nvml import DriverCard, read_cards
from vram.errors import Invalid
from vram.gpu import Device, device_named

ACCELERATOR_LABEL = "accelerator_type:"
ANSWER_S = 60.0
# ECC, MIG mode and the driver's version move a card's memory by less than this.
SAME_CARD = 1.02


def connected() -> bool:
    return bool(ray.is_initialized())


def connect() -> None:
    """To the cluster that runs here or that RAY_ADDRESS names; raises Invalid if there is none."""
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise Invalid(
            'no Ray cluster runs here: name the cards with --gpus "2x8xH200, 1x4xL40S", or give '
            "--inventory FILE",
            "gpus",
        ) from error


def read_inventory(*, as_if_empty: bool = False) -> tuple[Node, ...]:
    """Every living node of the cluster that this process is connected to.

    `as_if_empty` counts what is in use as free: for a model that is to take the place of another.
    """
    ray_nodes = ray.nodes()
    available = available_resources_per_node()
    if as_if_empty:
        available = {node["NodeID"]: node["Resources"] for node in ray_nodes if node["Alive"]}
    return nodes_from_ray(ray_nodes, available, _driver_cards(ray_nodes), as_if_empty=as_if_empty)


def nodes_from_ray(
    ray_nodes: Sequence[Mapping[str, Any]],
    available: Mapping[str, Mapping[str, float]],
    driver_cards: Mapping[str, Sequence[DriverCard]] | None = None,
    *,
    as_if_empty: bool = False,
) -> tuple[Node, ...]:
    """Ray's node table and what is unclaimed of each node, as values; sorted by name.

    Of a node whose driver did not answer only Ray's label is known: a card with two sizes counts
    as the smaller one. Ray says how much GPU is free in sum, not on which card: the rest after
    whole cards is one card.
    """
    living = [ray_node for ray_node in ray_nodes if ray_node["Alive"]]
    num_of_name = Counter(ray_node["NodeName"] for ray_node in living)
    nodes = []
    for ray_node in living:
        # Ray's name is the address, which several nodes of one machine share.
        unique = num_of_name[ray_node["NodeName"]] == 1
        node = _node(
            ray_node["NodeName"] if unique else ray_node["NodeID"],
            ray_node["Resources"],
            available.get(ray_node["NodeID"], {}),
            (driver_cards or {}).get(ray_node["NodeID"], ()),
            as_if_empty=as_if_empty,
        )
        nodes.append(node)
    return tuple(sorted(_levelled(nodes), key=lambda node: node.name))


def _levelled(nodes: Sequence[Node]) -> list[Node]:
    """Cards of one name that differ by a driver's few MiB are of one kind, the smallest."""
    smallest: dict[str, Device] = {}
    for gpu in (gpu for node in nodes for gpu in node.gpus):
        least = smallest.setdefault(gpu.name, gpu)
        if gpu.total_bytes < least.total_bytes:
            smallest[gpu.name] = gpu

    def level(gpu: Device) -> Device:
        least = smallest[gpu.name]
        return least if gpu.total_bytes < SAME_CARD * least.total_bytes else gpu

    return [replace(node, gpus=tuple(level(gpu) for gpu in node.gpus)) for node in nodes]


def _node(
    name: str,
    resources: Mapping[str, float],
    available: Mapping[str, float],
    cards: Sequence[DriverCard],
    *,
    as_if_empty: bool,
) -> Node:
    num_gpus = int(resources.get("GPU", 0))
    label = _label(resources)
    free = _free_shares(num_gpus, float(available.get("GPU", 0.0)))
    node = Node(
        name=name,
        gpus=(),
        free=(),
        cpus=float(available.get("CPU", 0.0)),
        memory_bytes=int(available.get("memory", 0)),
        label=label,
    )
    if num_gpus == 0:
        return node
    if len(cards) != num_gpus:  # Ray was told to hand out others than the driver has
        return replace(node, gpus=(_labelled(label),) * num_gpus, free=free)
    if not as_if_empty:
        cards = sorted(cards, key=lambda card: -card.free_share)
        free = tuple(min(card.free_share, share) for card, share in zip(cards, free, strict=True))
    return replace(
        node,
        gpus=tuple(card.device for card in cards),
        free=free,
        nvlink=all(card.nvlinks > 0 for card in cards),
    )


def _label(resources: Mapping[str, float]) -> str:
    labels = [name for name in resources if name.startswith(ACCELERATOR_LABEL)]
    return labels[0].removeprefix(ACCELERATOR_LABEL) if labels else ""


def _labelled(label: str) -> Device:
    return device_named(label or "unlabelled")


def _free_shares(num_gpus: int, free_gpus: float) -> tuple[float, ...]:
    whole = min(math.floor(free_gpus + 1e-9), num_gpus)
    rest = round(max(free_gpus - whole, 0.0), 4)
    shares = [1.0] * whole + ([rest] if whole < num_gpus else [])
    return tuple(shares + [0.0] * (num_gpus - len(shares)))


def _driver_cards(ray_nodes: Sequence[Mapping[str, Any]]) -> dict[str, Sequence[DriverCard]]:
    """Asks the driver of every node that has GPUs; a node that does not answer is left out."""
    read = ray.remote(num_cpus=0, max_retries=0)(read_cards)
    asked = {
        node["NodeID"]: read.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in ray_nodes
        if node["Alive"] and node["Resources"].get("GPU", 0) >= 1
    }
    if not asked:
        return {}
    answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
    found: dict[str, Sequence[DriverCard]] = {}
    for node_id, answer in asked.items():
        if answer not in answered:
            continue
        try:
            found[node_id] = ray.get(answer)
        except (Invalid, ray.exceptions.RayError):
            continue  # no driver there: Ray's label has to do
    return found
