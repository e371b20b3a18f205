"""`ballast plan`: where every model of a config would run, and why. Starts nothing."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.inventory_file import read_inventory_file
from cluster.model_configs import read_model_configs
from deployments.config import ModelConfig
from deployments.errors import Invalid
from deployments.planning import request_of
from placement.choose import Decision, choose
from placement.explain import Explanation, explain
from placement.nodes import Node
from placement.words import nodes_from_words


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The decision for a whole config, and an explanation for each model that has a place."""

    configs: tuple[ModelConfig, ...]
    decision: Decision
    explanations: dict[str, Explanation]  # of the first replica

    @property
    def fits(self) -> bool:
        return self.decision.fits


def plan_config(path: Path, *, gpus: str | None, inventory: Path | None) -> Answer:
    """Raises `Invalid` for a config, an inventory or a wish that can't be."""
    configs = read_model_configs(path)
    nodes = _nodes(configs, gpus, inventory)
    return answer(configs, nodes)


def answer(configs: Sequence[ModelConfig], nodes: Sequence[Node]) -> Answer:
    decision = choose([request_of(config) for config in configs], nodes)
    explanations = {
        placed.request.name: explain(placed, decision.menus[placed.request.name], decision.kinds)
        for placed in reversed(decision.placed)
    }
    return Answer(configs=tuple(configs), decision=decision, explanations=explanations)


def _nodes(
    configs: Sequence[ModelConfig], gpus: str | None, inventory: Path | None
) -> tuple[Node, ...]:
    if gpus is not None and inventory is not None:
        raise Invalid("--gpus and --inventory both say which cards there are: leave one out")
    if gpus is not None:
        return nodes_from_words(gpus)
    if inventory is not None:
        return read_inventory_file(inventory)
    if all(config.device.kind == "cpu" for config in configs):
        return (_this_machine(),)
    from placement.inventory import connect, connected, read_inventory

    if not connected():
        connect()
    return read_inventory()


def _this_machine() -> Node:
    """For models on the CPU no Ray has to run."""
    return Node(
        name="this-machine",
        gpus=(),
        free=(),
        cpus=float(os.cpu_count() or math.inf),
        memory_bytes=psutil.virtual_memory().available,
    )
