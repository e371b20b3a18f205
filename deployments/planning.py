"""From a model's configuration to its plan and its bundles. Starts nothing and needs no Ray."""

from collections.abc import Sequence

from deployments.config import ModelConfig
from deployments.errors import Invalid
from deployments.shapes import shape_of
from placement.bundles import Bundles, bundles
from placement.choose import best_plan
from placement.kinds import card_kinds, usual_nodes
from placement.nodes import Node
from placement.requests import Request
from vram.model import ModelShape
from vram.plan import Plan, plan


def request_of(config: ModelConfig, shape: ModelShape | None = None) -> Request:
    """What the configuration asks of the planner. Raises `Invalid` for a model it can't read."""
    return Request(
        name=config.name,
        shape=shape or shape_of(config),
        wishes=config.wishes(),
        engine=config.engine,
        objective=config.objective or "throughput",
        device=config.device.device(),
        max_gpus=config.max_gpus,
        num_replicas=config.num_replicas,
        replica_cpus=config.replica_cpus,
        engine_cpus=config.engine_cpus,
    )


def make_plan(config: ModelConfig, nodes: Sequence[Node] | None = None) -> tuple[Plan, Bundles]:
    """What one replica gets and where it has to be. Raises `Invalid` with what to change.

    `nodes` is the cluster; without it the plan is for servers with eight of the named card.
    """
    request = request_of(config)
    label = ""
    if config.device.kind == "cpu":
        assert request.device is not None
        planned = plan(
            request.shape, request.wishes, request.device, config.engine, name=config.name
        )
    else:
        here = [] if nodes is None else _with_card(nodes, request)
        planned = best_plan(request, here or _usual(request))
        if config.device.name is None and len(card_kinds(here)) > 1:
            label = next(node.label for node in here if planned.device in node.gpus)
    return planned, bundles(
        planned,
        replica_cpus=config.replica_cpus,
        engine_cpus=config.engine_cpus,
        card_label=label,
    )


def _with_card(nodes: Sequence[Node], request: Request) -> list[Node]:
    """The nodes that have the named card: none yet where an autoscaler would bring one."""
    device = request.device
    return [
        node
        for node in nodes
        if node.gpus and (device is None or any(gpu.name == device.name for gpu in node.gpus))
    ]


def _usual(request: Request) -> tuple[Node, ...]:
    if request.device is None:
        raise Invalid(
            f"{request.name} leaves the card to the plan, and no node here has a GPU: name it in "
            "device.name, as in `H200`",
            "device.name",
        )
    return usual_nodes(request.device, request.max_gpus)
