import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vram.engines import ENGINES
from vram.errors import Invalid, UnknownDtype
from vram.estimate import estimate
from vram.gpu import cpu_device, device_named
from vram.graphs import num_captures
from vram.model import ModelShape
from vram.settings import EngineSettings
from vram.units import GIB

H200 = device_named("H200")
LOADS = [
    json.loads(line)
    for line in (Path(__file__).parent / "vllm_h200.jsonl").read_text().splitlines()
]
LOADED = [load for load in LOADS if "root_cause" not in load]
FAILED = [load for load in LOADS if "root_cause" in load]


def _name(load: dict[str, Any]) -> str:
    return f"{load['model']} {load['args']}"


def _gib(estimated, item: str) -> float:
    return estimated.item(item).bytes / GIB


@pytest.mark.parametrize("load", LOADED, ids=_name)
def test_items_match_the_recorded_loads(load, shape_of, settings_with) -> None:
    estimated = estimate(shape_of(load["model"]), settings_with(**load["args"]), H200)
    assert estimated.fits
    assert _gib(estimated, "weights") == pytest.approx(load["weight_gib"], rel=0.01)
    assert _gib(estimated, "peak_activation") == pytest.approx(
        load["peak_activation_gib"], rel=0.15
    )
    assert _gib(estimated, "cuda_graphs") == pytest.approx(load.get("cuda_graph_gib", 0.0), abs=0.3)
    assert _gib(estimated, "non_torch") == pytest.approx(load.get("non_torch_gib", 0.22), abs=0.3)
    assert _gib(estimated, "kv_cache") == pytest.approx(load["kv_cache_gib"], rel=0.02)
    assert estimated.kv_cache_tokens == pytest.approx(load["kv_cache_tokens"], rel=0.02)
    used_bytes = load["device_used_after_64_requests_gib"] * GIB
    assert estimated.device_use_under_load_bytes == pytest.approx(used_bytes, rel=0.02)


@pytest.mark.parametrize("load", FAILED, ids=_name)
def test_a_load_that_failed_is_refused_beforehand(load, shape_of, settings_with) -> None:
    estimated = estimate(shape_of(load["model"]), settings_with(**load["args"]), H200)
    assert not estimated.fits
    said = {
        "No available memory": "No room for the KV cache",
        "To serve at least one request": "One sequence of 32768 tokens",
        "InductorError": "No room for the KV cache",  # the weights are the card
    }
    expected = next(ours for theirs, ours in said.items() if theirs in load["root_cause"])
    assert estimated.reason.startswith(expected)


def test_the_items_sum_to_the_total(shape_of, settings_with) -> None:
    estimated = estimate(shape_of("qwen2.5-7b"), settings_with(), H200)
    assert [item.name for item in estimated.items] == [
        "weights",
        "kv_cache",
        "peak_activation",
        "cuda_graphs",
        "non_torch",
        "communication",
    ]
    assert estimated.total_bytes == sum(item.bytes for item in estimated.items)
    assert all(item.formula and item.source for item in estimated.items)


def test_there_are_no_graphs_and_no_context_on_the_cpu(shape_of, settings_with) -> None:
    estimated = estimate(
        shape_of("qwen2.5-0.5b"), settings_with(dtype="float32"), cpu_device(16 * GIB)
    )
    assert estimated.item("cuda_graphs").bytes == 0
    assert estimated.device_use_under_load_bytes == estimated.total_bytes
    assert estimated.item("non_torch").bytes > GIB  # the engine's own processes


def test_transformers_takes_what_its_requests_need_and_not_the_whole_budget(
    shape_of, settings_with
) -> None:
    settings = settings_with(max_model_len=1024, max_num_seqs=4)
    shape = shape_of("qwen2.5-0.5b")
    small = estimate(shape, settings, H200, "transformers")
    assert small.item("kv_cache").bytes == 4 * small.sequence_bytes
    assert estimate(shape, settings, H200, "vllm").total_bytes > 10 * small.total_bytes


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_has_an_estimate_on_a_card(engine: str, shape_of, settings_with) -> None:
    assert estimate(shape_of("llama-3.1-8b"), settings_with(), H200, engine).fits


@pytest.mark.parametrize(
    ("changes", "engine", "setting"),
    [
        ({"tensor_parallel_size": 3}, "vllm", "tensor_parallel_size"),
        ({"tensor_parallel_size": 32}, "vllm", "tensor_parallel_size"),
        ({"pipeline_parallel_size": 29}, "vllm", "pipeline_parallel_size"),
        ({"max_model_len": 32769}, "vllm", "max_model_len"),
        ({"quantization": "rot13"}, "vllm", "quantization"),
        ({}, "tgi", "engine"),
    ],
)
def test_what_the_model_does_not_allow_names_the_setting(
    changes, engine: str, setting: str, shape_of, settings_with
) -> None:
    with pytest.raises(Invalid) as caught:
        estimate(shape_of("qwen2.5-7b"), settings_with(**changes), H200, engine)
    assert caught.value.setting == setting


def test_an_engine_that_needs_a_gpu_is_refused_on_the_cpu(shape_of, settings_with) -> None:
    with pytest.raises(Invalid, match="CPU"):
        estimate(shape_of("qwen2.5-7b"), settings_with(), cpu_device(GIB), "tensorrt_llm")


@pytest.mark.parametrize(
    ("setting", "value", "error"),
    [
        ("dtype", "int3", UnknownDtype),
        ("kv_cache_dtype", "fp3", UnknownDtype),
        ("max_model_len", 0, Invalid),
        ("max_num_seqs", -1, Invalid),
        ("gpu_memory_utilization", 0.0, Invalid),
        ("gpu_memory_utilization", float("nan"), Invalid),
        ("gpu_memory_utilization", 1.01, Invalid),
        ("kv_cache_memory_bytes", 0, Invalid),
        ("tensor_parallel_size", 0, Invalid),
    ],
)
def test_impossible_settings_are_refused(setting, value, error, settings_with) -> None:
    with pytest.raises(error) as caught:
        settings_with(**{setting: value})
    assert caught.value.setting == setting


@given(data=st.data(), tokens=st.integers(1, 16384), more=st.integers(0, 16384))
def test_more_context_and_more_batch_never_need_less(
    data, tokens: int, more: int, shape_of, settings_with
) -> None:
    shape: ModelShape = shape_of(data.draw(st.sampled_from(["qwen2.5-7b", "qwen3-30b-a3b"])))
    setting = data.draw(st.sampled_from(["max_model_len", "max_num_batched_tokens"]))
    less: EngineSettings = settings_with(**{setting: tokens})
    greater: EngineSettings = settings_with(**{setting: tokens + more})
    before, after = estimate(shape, less, H200), estimate(shape, greater, H200)
    assert before.needed_bytes <= after.needed_bytes


@pytest.mark.parametrize(
    ("changes", "captures"),
    # As vLLM says in its settings: the recorded loads, and batches that are no power of two.
    [
        ({}, 51),
        ({"max_num_seqs": 64}, 19),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 100}, 16),
        ({"max_num_seqs": 1}, 2),
    ],
)
def test_batches_are_captured_up_to_twice_the_sequences(
    changes: dict[str, int], captures: int, shape_of, settings_with
) -> None:
    assert num_captures(shape_of("qwen2.5-7b"), settings_with(**changes)) == captures


def test_gpt_oss_is_captured_further(shape_of, settings_with) -> None:
    assert num_captures(shape_of("gpt-oss-20b"), settings_with(max_num_seqs=256)) == 83


def test_only_the_older_runner_counts_its_graphs(shape_of, settings_with) -> None:
    for name, counted in (("qwen2.5-7b", 0.0), ("qwen3-30b-a3b", 0.82)):
        shape, settings = shape_of(name), settings_with()
        found = estimate(shape, settings, H200)
        left_out = found.item("communication").bytes
        graphs = found.item("cuda_graphs").bytes
        expected = found.budget_bytes - (found.fixed_bytes - left_out - (1 - counted) * graphs)
        assert found.cache_left_bytes == pytest.approx(expected, abs=2)


def test_eager_sums_over_gpus_are_tensors_of_their_own(shape_of, settings_with) -> None:
    shape = shape_of("qwen2.5-7b")
    eager = settings_with(tensor_parallel_size=2, enforce_eager=True, max_num_batched_tokens=32768)
    # Measured on two H200: 2.86 GiB.
    peak = estimate(shape, eager, H200).item("peak_activation")
    assert peak.bytes / GIB == pytest.approx(2.86, abs=0.01)


@pytest.mark.parametrize(
    ("model", "changes", "mib"),
    # The contexts of the loads on two H200: 1497 MiB, with experts 1983; 527 on one.
    [
        ("qwen2.5-7b", {}, 0),
        ("qwen2.5-7b", {"tensor_parallel_size": 2}, 1497 - 527),
        ("qwen3-30b-a3b", {"tensor_parallel_size": 2}, 1983 - 527),
    ],
)
def test_each_group_of_gpus_has_buffers(
    model: str, changes: dict[str, int], mib: int, shape_of, settings_with
) -> None:
    found = estimate(shape_of(model), settings_with(**changes), H200).item("communication")
    assert found.bytes / 2**20 == pytest.approx(mib, abs=2)
