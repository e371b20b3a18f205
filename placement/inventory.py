"""The live Ray cluster as nodes. The only file of this package that talks to Ray."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from placement.nodes import Node
from vram.gpu import Device, device_named

ACCELERATOR_LABEL = "accelerator_type:"


def read_inventory() -> tuple[Node, ...]:
    """Every living node of the cluster that this process is connected to."""
    return nodes_from_ray(ray.nodes(), available_resources_per_node())


def nodes_from_ray(
    ray_nodes: Sequence[Mapping[str, Any]], available: Mapping[str, Mapping[str, float]]
) -> tuple[Node, ...]:
    """Ray's node table and what is unclaimed of each node, as values; sorted by name.

    Ray labels a card by its product only, so a card with two sizes counts as the smaller one, and
    it says how much GPU is free in sum, not on which card: the rest after whole cards is one card.
    """
    living = [ray_node for ray_node in ray_nodes if ray_node["Alive"]]
    num_of_name = Counter(ray_node["NodeName"] for ray_node in living)
    nodes = [
        _node(
            # Ray's name is the address, which several nodes of one machine share.
            ray_node["NodeName"] if num_of_name[ray_node["NodeName"]] == 1 else ray_node["NodeID"],
            ray_node["Resources"],
            available.get(ray_node["NodeID"], {}),
        )
        for ray_node in living
    ]
    return tuple(sorted(nodes, key=lambda node: node.name))


def _node(name: str, resources: Mapping[str, float], available: Mapping[str, float]) -> Node:
    num_gpus = int(resources.get("GPU", 0))
    return Node(
        name=name,
        gpus=(_card(resources),) * num_gpus if num_gpus else (),
        free=_free_shares(num_gpus, float(available.get("GPU", 0.0))),
        cpus=float(available.get("CPU", 0.0)),
        memory_bytes=int(available.get("memory", 0)),
    )


def _card(resources: Mapping[str, float]) -> Device:
    labels = [name for name in resources if name.startswith(ACCELERATOR_LABEL)]
    return device_named(labels[0].removeprefix(ACCELERATOR_LABEL) if labels else "unlabelled")


def _free_shares(num_gpus: int, free_gpus: float) -> tuple[float, ...]:
    whole = min(math.floor(free_gpus + 1e-9), num_gpus)
    rest = round(max(free_gpus - whole, 0.0), 4)
    shares = [1.0] * whole + ([rest] if whole < num_gpus else [])
    return tuple(shares + [0.0] * (num_gpus - len(shares)))
