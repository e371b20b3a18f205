"""Plans for real models, made by the planner itself."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from vram.gpu import cpu_device, device_named
from vram.model import ModelShape
from vram.plan import Plan, Wishes, plan

CONFIGS = Path(__file__).parents[1] / "vram" / "configs"


@pytest.fixture(scope="session")
def shape_named() -> Callable[[str], ModelShape]:
    @cache
    def read(model: str) -> ModelShape:
        return ModelShape.from_config(json.loads((CONFIGS / model / "config.json").read_text()))

    return read


@pytest.fixture(scope="session")
def plan_for() -> Callable[..., Plan]:
    def make(model: str, card: str = "H200", ram_bytes: int = 0, **wishes: object) -> Plan:
        shape = ModelShape.from_config(json.loads((CONFIGS / model / "config.json").read_text()))
        device = cpu_device(ram_bytes) if card == "CPU" else device_named(card)
        return plan(shape, Wishes(**wishes), device, name=model)  # type: ignore[arg-type]

    return make
