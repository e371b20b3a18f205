import time
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.fit import Placement, place
from placement.nodes import Node
from placement.words import nodes_from_words
from vram.errors import Invalid
from vram.gpu import device_named
from vram.units import GIB


def _where(placement: Placement) -> dict[str, list[tuple[str, int]]]:
    return {
        assignment.model: [(slot.node, slot.gpu) for slot in assignment.slots]
        for assignment in placement.assignments
    }


def test_a_tensor_parallel_group_takes_two_cards_of_one_node(plan_for) -> None:
    placement = place(
        {"big": plan_for("qwen2.5-72b", tensor_parallel_size=2)},
        nodes_from_words("3x1xH200, 2xH200"),
    )
    assert _where(placement) == {"big": [("h200-3", 0), ("h200-3", 1)]}
    assert len(placement.rejections) == 3
    assert placement.rejections[0].reason == "1 of its 1 GPUs have 1 free, 2 are needed"


def test_models_that_share_a_card_sum_to_at_most_one(plan_for) -> None:
    plan = plan_for("qwen2.5-0.5b", gpu_fraction=0.4)
    placement = place({"a": plan, "b": plan, "c": plan}, nodes_from_words("2xH200"))
    assert _where(placement) == {
        "a": [("h200-0", 0)],
        "b": [("h200-0", 0)],
        "c": [("h200-0", 1)],
    }


def test_a_small_card_is_left_to_small_models(plan_for) -> None:
    nodes = nodes_from_words("1xH200, 1xL4")
    placement = place({"small": plan_for("qwen2.5-7b", "L4")}, nodes)
    assert _where(placement) == {"small": [("l4-1", 0)]}


def test_a_card_below_the_plan_is_rejected_with_both_sizes(plan_for) -> None:
    placement = place({"m": plan_for("qwen2.5-7b", "H200")}, nodes_from_words("1xL4"))
    assert placement.unplaced == ("m",)
    assert placement.rejections[0].reason == (
        "its largest GPU has 22.0 GiB, the plan is for 139.8 GiB (H200)"
    )


def test_stages_spread_over_nodes_only_when_no_node_has_room_for_all(plan_for) -> None:
    plan = plan_for("qwen2.5-72b", tensor_parallel_size=2, pipeline_parallel_size=2)
    together = place({"m": plan}, nodes_from_words("2x2xH200, 4xH200"))
    assert {node for node, _ in _where(together)["m"]} == {"h200-2"}
    apart = place({"m": plan}, nodes_from_words("2x2xH200"))
    assert _where(apart)["m"] == [("h200-0", 0), ("h200-0", 1), ("h200-1", 0), ("h200-1", 1)]


def test_a_spread_that_fails_takes_nothing(plan_for) -> None:
    pipeline = plan_for("qwen2.5-72b", tensor_parallel_size=2, pipeline_parallel_size=2)
    single = plan_for("qwen2.5-7b")
    placement = place({"pipeline": pipeline, "single": single}, nodes_from_words("1x2xH200"))
    assert placement.unplaced == ("pipeline",)
    assert "single" in _where(placement)


def test_cpus_that_are_too_few_are_the_reason(plan_for) -> None:
    node = Node(name="n", gpus=(device_named("H200"),), free=(1.0,), cpus=2.0)
    placement = place({"m": plan_for("qwen2.5-7b")}, [node], replica_cpus=1, engine_cpus=4)
    assert placement.rejections[0].reason == "2 CPUs are free, 5 are needed"


def test_a_model_on_the_cpu_goes_where_its_ram_is(plan_for) -> None:
    plan = plan_for("qwen2.5-0.5b", "CPU", ram_bytes=8 * GIB, max_model_len=4096)
    nodes = [
        Node(name="small", gpus=(), free=(), cpus=8, memory_bytes=2 * GIB),
        Node(name="large", gpus=(), free=(), cpus=8, memory_bytes=12 * GIB),
    ]
    placement = place({"a": plan, "b": plan}, nodes)
    assert _where(placement) == {"a": [("large", -1)]}
    assert placement.unplaced == ("b",)
    assert "2.0 GiB of RAM are free" in placement.rejections[0].reason


def test_a_node_with_more_shares_than_cards_is_refused() -> None:
    with pytest.raises(Invalid):
        Node(name="n", gpus=(), free=(1.0,), cpus=1)


def test_fifty_models_on_a_thousand_gpus_take_less_than_two_seconds(plan_for) -> None:
    plans = {f"m{n}": plan_for("qwen2.5-7b") for n in range(25)}
    plans |= {f"big{n}": plan_for("qwen2.5-72b", tensor_parallel_size=2) for n in range(25)}
    started = time.perf_counter()
    placement = place(plans, nodes_from_words("125x8xH200"))
    assert time.perf_counter() - started < 2
    assert not placement.unplaced


@given(
    fractions=st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0]), max_size=12),
    words=st.sampled_from(["1xH200", "2x2xH200", "1xH200, 2xL4"]),
)
def test_no_card_is_given_away_twice_and_no_model_is_forgotten(fractions, words, plan_for) -> None:
    plans = {
        f"m{n:02}": plan_for("qwen2.5-0.5b", gpu_fraction=fraction)
        for n, fraction in enumerate(fractions)
    }
    nodes = nodes_from_words(words)
    placement = place(plans, nodes)
    used: dict[tuple[str, int], float] = defaultdict(float)
    for assignment in placement.assignments:
        for slot in assignment.slots:
            used[slot.node, slot.gpu] += slot.share
    assert all(share <= 1 + 1e-6 for share in used.values())
    assert {a.model for a in placement.assignments} | set(placement.unplaced) == set(plans)
    reversed_plans = dict(reversed(plans.items()))
    assert place(reversed_plans, nodes) == placement
    rejected = {rejection.model for rejection in placement.rejections}
    assert set(placement.unplaced) <= rejected
