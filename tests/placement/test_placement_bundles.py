from dataclasses import replace

import pytest

from placement.bundles import bundles
from vram.errors import Invalid
from vram.units import GIB


def test_a_whole_card_is_one_bundle_after_the_replicas(plan_for) -> None:
    made = bundles(plan_for("qwen2.5-7b"), replica_cpus=1, engine_cpus=4)
    assert made.bundles == ({"CPU": 1.0}, {"CPU": 4.0, "GPU": 1.0})
    assert made.strategy == "STRICT_PACK"


def test_a_shared_card_is_a_fraction(plan_for) -> None:
    made = bundles(plan_for("qwen2.5-0.5b", gpu_fraction=0.25), 1, 1)
    assert made.bundles == ({"CPU": 1.0}, {"CPU": 1.0, "GPU": 0.25})


def test_tensor_parallel_stays_on_one_node_and_a_pipeline_may_spread(plan_for) -> None:
    tensor = bundles(plan_for("qwen2.5-72b", tensor_parallel_size=2), 1, 2)
    assert tensor.bundles == ({"CPU": 1.0}, *({"CPU": 2.0, "GPU": 1.0},) * 2)
    assert tensor.strategy == "STRICT_PACK"
    pipeline = bundles(
        plan_for("qwen2.5-72b", tensor_parallel_size=2, pipeline_parallel_size=2), 1, 2
    )
    assert len(pipeline.bundles) == 5
    assert pipeline.strategy == "PACK"


def test_on_the_cpu_the_bundle_reserves_the_estimated_ram(plan_for) -> None:
    plan = plan_for("qwen2.5-0.5b", "CPU", ram_bytes=8 * GIB, max_model_len=4096)
    made = bundles(plan, 1, 2)
    assert made.bundles == (
        {"CPU": 1.0},
        {"CPU": 2.0, "memory": float(plan.estimate.total_bytes)},
    )
    assert made.strategy == "STRICT_PACK"


def test_no_two_bundles_are_the_same_object(plan_for) -> None:
    made = bundles(plan_for("qwen2.5-72b", tensor_parallel_size=2), 1, 2)
    assert made.bundles[1] is not made.bundles[2]


def test_a_fraction_of_several_cards_is_refused(plan_for) -> None:
    plan = replace(plan_for("qwen2.5-72b", tensor_parallel_size=2), gpu_fraction=0.5)
    with pytest.raises(Invalid, match="one card"):
        bundles(plan, 1, 1)


@pytest.mark.parametrize("cpus", [-1.0, float("nan"), float("inf")])
def test_cpus_are_a_number(cpus: float, plan_for) -> None:
    with pytest.raises(Invalid, match="replica_cpus"):
        bundles(plan_for("qwen2.5-7b"), cpus, 1)
