"""Which cards and settings models get, alone and beside each other."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.choose import Decision, best_plan, choose
from placement.errors import NoRoom
from placement.nodes import Node
from placement.requests import OBJECTIVES, Request
from placement.words import nodes_from_words
from vram.errors import DoesNotFit, Invalid
from vram.gpu import cpu_device, device_named
from vram.units import GIB
from vram.wishes import Wishes

Ask = Callable[..., Request]


def where(decision: Decision) -> dict[str, list[tuple[str, int]]]:
    return {
        f"{placed.request.name}#{placed.replica}": [(slot.node, slot.gpu) for slot in placed.slots]
        for placed in decision.placed
    }


def cards(decision: Decision) -> dict[str, tuple[str, int]]:
    return {p.request.name: (p.plan.device.name, len(p.slots)) for p in decision.placed}


# One model


def test_the_smallest_split_that_fits_is_taken(ask: Ask) -> None:
    nodes = nodes_from_words("2x8xH200")
    assert best_plan(ask("qwen2.5-7b"), nodes).settings.num_gpus == 1
    assert best_plan(ask("qwen3-235b-a22b"), nodes).settings.tensor_parallel_size == 4


def test_a_group_grows_inside_its_node_before_stages_cross_nodes(ask: Ask) -> None:
    settings = best_plan(ask("deepseek-v3"), nodes_from_words("2x8xH100")).settings
    assert (settings.tensor_parallel_size, settings.pipeline_parallel_size) == (8, 2)
    decision = choose([ask("deepseek-v3")], nodes_from_words("2x8xH100"))
    (placed,) = decision.placed
    assert [slot.node for slot in placed.slots] == ["h100-80gb-0"] * 8 + ["h100-80gb-1"] * 8


def test_stages_make_up_for_heads_that_do_not_divide(ask: Ask) -> None:
    """Qwen2.5-7B has 28 heads: 4 divides them and 8 does not."""
    settings = best_plan(
        ask("qwen2.5-7b", context=32768, concurrency=100), nodes_from_words("8xL4")
    ).settings
    assert settings.tensor_parallel_size == 4
    assert settings.pipeline_parallel_size == 2


def test_a_context_that_is_wished_is_a_least_and_not_a_pin(ask: Ask) -> None:
    nodes = nodes_from_words("1xL4")
    plan = best_plan(ask("qwen2.5-7b", context=4096), nodes)
    assert plan.settings.max_model_len >= 4096
    alone = best_plan(ask("qwen2.5-7b"), nodes)
    assert plan.settings.max_model_len == alone.settings.max_model_len


def test_concurrency_is_room_for_so_many_whole_requests(ask: Ask) -> None:
    plan = best_plan(ask("qwen2.5-7b", context=8192, concurrency=40), nodes_from_words("8xL40S"))
    assert plan.settings.max_num_seqs >= 40
    assert plan.estimate.kv_cache_tokens >= 40 * 8192


def test_more_concurrency_takes_more_cards(ask: Ask) -> None:
    nodes = nodes_from_words("8xL40S")
    few = best_plan(ask("llama-3.1-8b", context=8192, concurrency=8), nodes)
    many = best_plan(ask("llama-3.1-8b", context=8192, concurrency=120), nodes)
    assert few.settings.num_gpus < many.settings.num_gpus


def test_latency_takes_more_cards_where_a_token_gets_faster(ask: Ask) -> None:
    nodes = nodes_from_words("8xH200")
    fast = best_plan(ask("qwen2.5-72b", objective="latency"), nodes).settings
    assert fast.tensor_parallel_size == 8
    assert fast.max_num_batched_tokens == 2048
    usual = best_plan(ask("qwen2.5-72b"), nodes).settings
    assert usual.tensor_parallel_size == 2


def test_latency_leaves_a_small_model_on_one_card(ask: Ask) -> None:
    assert (
        best_plan(
            ask("qwen2.5-0.5b", objective="latency"), nodes_from_words("8xH200")
        ).settings.num_gpus
        == 1
    )


def test_throughput_takes_the_card_with_most_of_it_and_cheapest_the_least_of_a_card(
    ask: Ask,
) -> None:
    nodes = nodes_from_words("1xH200, 1xL4")
    assert best_plan(ask("qwen2.5-0.5b"), nodes).device.name == "H200"
    cheap = best_plan(ask("qwen2.5-0.5b", objective="cheapest"), nodes)
    assert cheap.device.name == "L4"
    assert 0.05 <= cheap.gpu_fraction < 0.5


def test_eight_bits_of_cache_come_before_more_cards_only_where_cheap_is_asked_for(
    ask: Ask,
) -> None:
    wishes = {"context": 8192, "concurrency": 12}
    nodes = nodes_from_words("8xL40S")
    plain = best_plan(ask("qwen2.5-14b", **wishes), nodes)
    assert (plain.settings.num_gpus, plain.settings.kv_cache_dtype) == (2, "auto")
    cheap = best_plan(ask("qwen2.5-14b", objective="cheapest", **wishes), nodes)
    assert (cheap.settings.num_gpus, cheap.settings.kv_cache_dtype) == (1, "fp8")


def test_where_nothing_else_fits_the_cache_is_kept_in_eight_bits(ask: Ask) -> None:
    wishes = {"context": 8192, "concurrency": 12}
    plan = best_plan(ask("qwen2.5-14b", **wishes), nodes_from_words("1xL40S"))
    assert plan.settings.kv_cache_dtype == "fp8"
    with pytest.raises(DoesNotFit):
        best_plan(ask("qwen2.5-14b", kv_cache_dtype="auto", **wishes), nodes_from_words("1xL40S"))


def test_pins_are_kept(ask: Ask) -> None:
    plan = best_plan(
        ask("qwen2.5-7b", tensor_parallel_size=2, max_model_len=4096, gpu_memory_utilization=0.5),
        nodes_from_words("8xH200"),
    )
    settings = plan.settings
    assert (settings.tensor_parallel_size, settings.max_model_len) == (2, 4096)
    assert settings.gpu_memory_utilization == 0.5


def test_a_slice_of_a_card_is_never_one_of_several(ask: Ask) -> None:
    part = replace(device_named("H100-80GB"), name="H100-80GB MIG 3g.40gb", total_bytes=39 * GIB)
    node = Node(name="n", gpus=(part,) * 2, free=(1.0,) * 2, cpus=64)
    assert best_plan(ask("qwen2.5-7b", objective="latency"), [node]).settings.num_gpus == 1
    with pytest.raises(DoesNotFit):
        best_plan(ask("qwen2.5-32b"), [node])


# Refusals


@pytest.mark.parametrize(
    ("changes", "words", "setting", "said"),
    [
        ({}, "2xL40S", "tensor_parallel_size", "on 4 GPUs"),
        ({"max_gpus": 1}, "8xH200", "tensor_parallel_size", "on 2 GPUs"),
        ({"context": 40000}, "8xH200", "context", "needs rope_scaling"),
        ({"context": 0}, "8xH200", "context", "at least 1"),
        ({"concurrency": 0}, "8xH200", "concurrency", "1 to"),
        ({"context": 4096, "max_model_len": 2048}, "8xH200", "context", "remove one"),
        ({"concurrency": 9, "max_num_seqs": 2}, "8xH200", "concurrency", "remove one"),
        ({"dtype": "int3"}, "8xH200", "dtype", "Unknown dtype"),
        ({"tensor_parallel_size": 3}, "8xH200", "tensor_parallel_size", "does not divide"),
        ({"tensor_parallel_size": 8}, "2x4xH200", "gpus", "8 x H200 on one node, and 4 are left"),
        ({"card": "H200"}, "8xL40S", "device.name", "the inventory has 8 x L40S"),
    ],
)
def test_a_model_that_can_not_run_there_is_told_why(
    ask: Ask, changes: dict[str, Any], words: str, setting: str, said: str
) -> None:
    with pytest.raises(Invalid, match=said) as refused:
        best_plan(ask("qwen2.5-72b", **changes), nodes_from_words(words))
    assert refused.value.setting == setting
    assert "\n" not in str(refused.value)


def test_too_much_at_once_is_told_how_much_fits(ask: Ask) -> None:
    def asked(concurrency: int) -> Request:
        return ask("qwen2.5-7b", context=32768, concurrency=concurrency, kv_cache_dtype="auto")

    nodes = nodes_from_words("1xL40S")
    with pytest.raises(DoesNotFit, match=r"500 requests of 32768 tokens at once") as refused:
        best_plan(asked(500), nodes)
    assert refused.value.setting == "concurrency"
    assert refused.value.needed_bytes > refused.value.available_bytes
    most = int(refused.value.would_fit.removeprefix("It fits with concurrency ").rstrip("."))
    assert best_plan(asked(most), nodes).estimate.fits
    with pytest.raises(DoesNotFit):
        best_plan(asked(most + 1), nodes)


def test_an_inventory_without_a_gpu_is_one_clear_error(ask: Ask) -> None:
    node = Node(name="n", gpus=(), free=(), cpus=8)
    with pytest.raises(Invalid, match="the inventory has no GPU") as refused:
        choose([ask("qwen2.5-7b")], [node])
    assert refused.value.setting == "gpus"


def test_a_model_on_the_cpu_needs_no_gpu_and_its_ram(ask: Ask) -> None:
    request = replace(
        ask("qwen2.5-0.5b", max_model_len=4096), device=cpu_device(8 * GIB), num_replicas=2
    )
    node = Node(name="n", gpus=(), free=(), cpus=8, memory_bytes=12 * GIB)
    decision = choose([request], [node])
    assert where(decision) == {"qwen2.5-0.5b#0": [("n", -1)]}
    assert "lower device.memory_gib" in str(decision.unplaced[0].error)


def test_one_name_twice_is_refused(ask: Ask) -> None:
    with pytest.raises(Invalid, match="two models"):
        choose([ask("qwen2.5-7b"), ask("qwen2.5-7b")], nodes_from_words("8xH200"))


# Several models


def test_a_large_model_is_not_kept_out_by_small_ones(ask: Ask) -> None:
    decision = choose(
        [ask("qwen2.5-7b", num_replicas=4), ask("qwen2.5-72b")], nodes_from_words("2xH200, 4xL40S")
    )
    assert decision.fits
    assert cards(decision) == {"qwen2.5-7b": ("L40S", 1), "qwen2.5-72b": ("H200", 2)}


def test_what_is_only_nice_to_have_goes_before_anybody_is_left_out(ask: Ask) -> None:
    """Alone, the first would take all eight cards."""
    decision = choose(
        [ask("qwen2.5-72b", objective="latency"), ask("qwen2.5-7b", num_replicas=5)],
        nodes_from_words("8xH200"),
    )
    assert decision.fits
    assert cards(decision)["qwen2.5-72b"] == ("H200", 2)
    alone = choose([ask("qwen2.5-72b", objective="latency")], nodes_from_words("8xH200"))
    assert cards(alone)["qwen2.5-72b"] == ("H200", 8)


def test_what_is_left_over_goes_to_those_who_gain_from_it(ask: Ask) -> None:
    decision = choose(
        [ask("qwen2.5-72b", objective="latency"), ask("qwen2.5-7b", num_replicas=3)],
        nodes_from_words("8xH200"),
    )
    assert decision.fits
    assert cards(decision)["qwen2.5-72b"] == ("H200", 4)


def test_cheap_models_share_a_card(ask: Ask) -> None:
    cheap = {"objective": "cheapest", "context": 4096}
    decision = choose(
        [ask("qwen2.5-7b", **cheap), ask("llama-3.2-3b", **cheap), ask("qwen2.5-0.5b", **cheap)],
        nodes_from_words("2xH100"),
    )
    assert {slot for slots in where(decision).values() for slot in slots} == {("h100-80gb-0", 0)}
    use = sum(p.plan.estimate.device_use_under_load_bytes for p in decision.placed)
    assert use <= device_named("H100-80GB").total_bytes


def test_when_not_all_fit_as_many_as_possible_do(ask: Ask) -> None:
    decision = choose(
        [ask("qwen2.5-72b"), ask("qwen2.5-7b"), ask("llama-3.1-8b")], nodes_from_words("2xH200")
    )
    assert {p.request.name for p in decision.placed} == {"qwen2.5-7b", "llama-3.1-8b"}
    (left,) = decision.unplaced
    assert isinstance(left.error, NoRoom)
    assert "qwen2.5-72b needs 2 x H200 on one node, and 0 are left there" in str(left.error)


def test_two_who_would_take_everything_share_it(ask: Ask) -> None:
    decision = choose(
        [ask("qwen2.5-72b", objective="latency"), ask("llama-3.1-70b", objective="latency")],
        nodes_from_words("8xH200"),
    )
    assert decision.fits
    assert cards(decision) == {"qwen2.5-72b": ("H200", 4), "llama-3.1-70b": ("H200", 4)}


def test_many_small_models_count_for_more_than_one_large_one(ask: Ask) -> None:
    decision = choose(
        [
            ask("qwen2.5-72b", tensor_parallel_size=4),
            ask("qwen2.5-32b", tensor_parallel_size=2, num_replicas=2),
            ask("qwen2.5-7b", num_replicas=4),
        ],
        nodes_from_words("4xH100"),
    )
    assert [placed.request.name for placed in decision.placed] == ["qwen2.5-7b"] * 4
    assert len(decision.unplaced) == 3


def test_of_a_node_with_two_kinds_of_cards_the_right_ones_are_taken(ask: Ask) -> None:
    gpus = (device_named("L4"), device_named("H200"), device_named("L4"), device_named("H200"))
    node = Node(name="n", gpus=gpus, free=(1.0,) * 4, cpus=64)
    decision = choose([ask("qwen2.5-72b"), ask("qwen2.5-7b", card="L4")], [node])
    assert where(decision) == {"qwen2.5-72b#0": [("n", 1), ("n", 3)], "qwen2.5-7b#0": [("n", 0)]}


MODELS = ("qwen2.5-0.5b", "qwen2.5-7b", "llama-3.1-8b", "qwen3-30b-a3b", "qwen2.5-72b")
INVENTORIES = ("1xH200", "2x4xH100", "1x2xH200, 2x4xL40S", "1xL4, 1xH100", "3x1xA100-80GB")
asked_for = st.lists(
    st.fixed_dictionaries(
        {
            "model": st.sampled_from(MODELS),
            "objective": st.sampled_from(OBJECTIVES),
            "num_replicas": st.integers(1, 3),
            "context": st.none() | st.integers(1, 32768),
            "concurrency": st.none() | st.integers(1, 64),
        }
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda asked: asked["model"],
)


@given(asked=asked_for, words=st.sampled_from(INVENTORIES), seed=st.randoms(use_true_random=False))
def test_no_card_holds_more_than_it_has_and_order_decides_nothing(
    ask: Ask, asked: list[dict[str, Any]], words: str, seed: Any
) -> None:
    requests = [ask(**each) for each in asked]
    nodes = list(nodes_from_words(words))
    decision = choose(requests, nodes)
    _check_cards(decision, nodes)
    assert len(decision.placed) + len(decision.unplaced) == sum(r.num_replicas for r in requests)
    for placed in decision.placed:
        wishes = placed.request.wishes
        settings = placed.plan.settings
        assert placed.plan.estimate.fits
        assert settings.max_model_len >= (wishes.context or 1)
        assert settings.max_num_seqs >= (wishes.concurrency or 1)
        assert placed.request.shape.split_problem(settings.tensor_parallel_size) == ""
    seed.shuffle(nodes)
    seed.shuffle(requests)
    again = choose(requests, nodes)
    assert where(again) == where(decision)
    assert {p.request.name: p.plan for p in again.placed} == {
        p.request.name: p.plan for p in decision.placed
    }


def _check_cards(decision: Decision, nodes: Sequence[Node]) -> None:
    shares: dict[tuple[str, int], float] = defaultdict(float)
    held_bytes: dict[tuple[str, int], int] = defaultdict(int)
    of_name = {node.name: node for node in nodes}
    for placed in decision.placed:
        assert len({(slot.node, slot.gpu) for slot in placed.slots}) == len(placed.slots)
        tensor = placed.plan.settings.tensor_parallel_size
        for first in range(0, len(placed.slots), tensor):
            assert len({slot.node for slot in placed.slots[first : first + tensor]}) == 1
        for slot in placed.slots:
            card = slot.node, slot.gpu
            shares[card] += slot.share
            held_bytes[card] += placed.plan.estimate.device_use_under_load_bytes
            assert of_name[slot.node].gpus[slot.gpu] == placed.plan.device
    assert all(share <= 1 + 1e-6 for share in shares.values())
    for (node, gpu), size in held_bytes.items():
        assert size <= of_name[node].gpus[gpu].total_bytes


@given(
    model=st.sampled_from(MODELS),
    objective=st.sampled_from(OBJECTIVES),
    words=st.sampled_from(INVENTORIES),
    contexts=st.tuples(st.integers(1, 32768), st.integers(1, 32768)),
    concurrency=st.integers(1, 64),
)
def test_more_context_never_fits_where_less_does_not(
    ask: Ask,
    model: str,
    objective: str,
    words: str,
    contexts: tuple[int, int],
    concurrency: int,
) -> None:
    nodes = nodes_from_words(words)
    asked = [
        ask(model, objective=objective, context=context, concurrency=concurrency)
        for context in sorted(contexts)
    ]
    less, more = (choose([request], nodes) for request in asked)
    assert less.fits or not more.fits
    if more.fits and objective == "cheapest":
        options = [decision.placed[0].option for decision in (less, more)]
        taken = [round(option.card_bytes / GIB) for option in options if option]
        assert taken[0] <= taken[1]


@pytest.fixture(scope="session")
def ask(shape_named: Callable[[str], Any]) -> Ask:
    def make(model: str, **values: Any) -> Request:
        card = values.pop("card", None)
        own = {name: values.pop(name) for name in list(values) if name in Request.__slots__}
        return Request(
            name=model,
            shape=shape_named(model),
            wishes=Wishes(**values),
            device=device_named(card) if card else None,
            **own,
        )

    return make
