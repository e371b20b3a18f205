"""What a model's config asks for is what it is served with."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.config import ModelConfig
from deployments.errors import Invalid
from deployments.planning import make_plan
from deployments.shapes import shape_of
from placement.inventory import nodes_from_ray
from placement.nodes import Node
from placement.words import nodes_from_words

REAL = Path(__file__).resolve().parents[1] / "vram/configs"


def config(model: str = "qwen2.5-72b", card: str | None = "H100-80GB", **args: Any) -> ModelConfig:
    device = {"kind": "cuda"} | ({"name": card} if card else {}) | args.pop("device", {})
    return ModelConfig.model_validate(
        {"name": "m", "model": str(REAL / model), "device": device} | args
    )


def test_without_a_split_the_smallest_that_fits_is_served() -> None:
    plan, bundles = make_plan(config())
    assert plan.settings.tensor_parallel_size == 2
    assert len(bundles.bundles) == 3


def test_a_cluster_bounds_the_split() -> None:
    latency = config("qwen2.5-32b", objective="latency")
    assert make_plan(latency)[0].settings.tensor_parallel_size == 8
    here = nodes_from_words("4x2xH100")
    assert make_plan(latency, here)[0].settings.tensor_parallel_size == 2


def test_max_gpus_bounds_it_without_a_cluster() -> None:
    latency = config("qwen2.5-32b", objective="latency", max_gpus=4)
    assert make_plan(latency)[0].settings.tensor_parallel_size == 4
    sixteen = config("deepseek-v3", max_gpus=16)
    settings = make_plan(sixteen)[0].settings
    assert (settings.tensor_parallel_size, settings.pipeline_parallel_size) == (8, 2)


def test_cheapest_is_served_on_a_share() -> None:
    plan, bundles = make_plan(config("qwen2.5-7b", objective="cheapest", context=4096))
    assert plan.gpu_fraction < 0.5
    assert bundles.bundles[1]["GPU"] == plan.gpu_fraction
    whole, _ = make_plan(config("qwen2.5-7b", context=4096))
    assert whole.gpu_fraction == 1.0


def test_context_and_concurrency_reach_the_settings() -> None:
    plan, _ = make_plan(config("qwen2.5-7b", "L40S", context=16384, concurrency=16))
    assert plan.settings.max_model_len >= 16384
    assert plan.settings.max_num_seqs >= 16
    assert plan.estimate.kv_cache_tokens >= 16 * 16384


def test_a_card_left_to_the_plan_is_asked_for_by_ray_s_label() -> None:
    def ray_node(node_id: str, label: str, number: int) -> dict[str, Any]:
        resources = {"CPU": 64.0, "GPU": float(number), f"accelerator_type:{label}": 1.0}
        return {"NodeID": node_id, "NodeName": node_id, "Alive": True, "Resources": resources}

    table = [ray_node("a", "L4", 4), ray_node("b", "H200", 2)]
    nodes = nodes_from_ray(table, {n["NodeID"]: n["Resources"] for n in table})
    plan, bundles = make_plan(config(card=None), nodes)
    assert plan.device.name == "H200"
    assert bundles.bundles[1] == {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H200": 0.001}
    assert "accelerator_type:H200" not in bundles.bundles[0]
    _, named = make_plan(config(card="H200"), nodes)
    assert named.bundles[1] == {"CPU": 1.0, "GPU": 1.0}


def test_a_card_left_to_the_plan_needs_a_cluster() -> None:
    for nodes in (None, [Node(name="n", gpus=(), free=(), cpus=8)]):
        with pytest.raises(Invalid, match=r"name it in device\.name"):
            make_plan(config(card=None), nodes)


def test_a_named_card_that_is_not_there_yet_is_planned_all_the_same() -> None:
    """An autoscaler may bring it."""
    plan, _ = make_plan(config(), nodes_from_words("8xL4"))
    assert plan.device.name == "H100-80GB"


@pytest.mark.parametrize(
    ("args", "leaves"),
    [
        ({}, True),
        ({"tensor_parallel_size": 4}, False),
        ({"engine": "transformers"}, False),
        ({"device": {"gpu_fraction": 0.5}}, False),
        ({"device": {"gpu_fraction": 1.0}}, True),
        ({"card": None, "tensor_parallel_size": 4}, True),
    ],
)
def test_who_needs_to_know_the_cluster(args: dict[str, Any], leaves: bool) -> None:
    assert config(**args).leaves_cards_to_the_plan is leaves


def test_adapters_are_planned_for() -> None:
    plain, _ = make_plan(config())
    adapted, _ = make_plan(config(max_loras=4, max_lora_rank=32))
    settings = adapted.settings
    assert (settings.max_loras, settings.max_lora_rank) == (4, 32)
    assert "lora" not in {item.name for item in plain.estimate.items}
    assert "lora" in {item.name for item in adapted.estimate.items}


PINNED = {"tensor_parallel_size": 2, "max_num_batched_tokens": 2048}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"objective": "latency", **PINNED}, "objective: latency has no effect"),
        ({"objective": "latency", "engine": "transformers"}, "objective: latency has no effect"),
        (
            {"objective": "cheapest", "device": {"gpu_fraction": 0.5}},
            "objective: cheapest has no effect",
        ),
        ({"objective": "cheapest", "tensor_parallel_size": 2}, "objective: cheapest has no"),
        ({"max_gpus": 2, "tensor_parallel_size": 2}, "max_gpus has no effect"),
        ({"max_gpus": 2, "engine": "transformers"}, "max_gpus has no effect"),
        ({"max_gpus": 2, "device": {"gpu_fraction": 0.5}}, "max_gpus has no effect"),
        ({"context": 10, "max_model_len": 10}, "context has no effect"),
        ({"max_loras": 2, "engine": "transformers"}, "max_loras has no effect"),
        ({"max_lora_rank": 8}, "max_lora_rank has no effect"),
        ({"engine_args": {"lora_modules": ["a=b"]}}, "write max_loras: 1"),
    ],
)
def test_a_wish_without_effect_is_refused(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(**args)


@pytest.mark.parametrize(
    "args",
    [
        {"objective": "throughput", **PINNED},
        {"objective": "latency", "tensor_parallel_size": 2},
        {"objective": "latency", "card": None, **PINNED},
        {"objective": "cheapest", "engine": "transformers"},
        {"objective": "cheapest", "tensor_parallel_size": 1},
        {"context": 10, "max_model_len": 10, "concurrency": 4},
    ],
)
def test_a_wish_with_an_effect_is_taken(args: dict[str, Any]) -> None:
    config(**args)


def test_objectives_that_are_taken_do_change_the_plan() -> None:
    """For each objective a config whose plan is another without it."""
    assert (
        make_plan(config("qwen2.5-7b", objective="cheapest", tensor_parallel_size=1))[0]
        != make_plan(config("qwen2.5-7b", tensor_parallel_size=1))[0]
    )
    assert (
        make_plan(config(objective="latency", tensor_parallel_size=4))[0]
        != make_plan(config(tensor_parallel_size=4))[0]
    )


def test_a_plan_counts_what_the_files_of_a_folder_hold(tmp_path: Path) -> None:
    """As `ballast estimate` does."""
    (tmp_path / "config.json").write_bytes((REAL / "qwen2.5-0.5b/config.json").read_bytes())
    wished = config(str(tmp_path))
    number = round(shape_of(wished).parameter_count * 1.1)
    header = {"w": {"dtype": "BF16", "shape": [number], "data_offsets": [0, 2 * number]}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert shape_of(wished).checkpoint_ratio == pytest.approx(1.1, rel=1e-3)
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(Invalid, match=r"^m: model\.safetensors is not a safetensors file"):
        shape_of(wished)
