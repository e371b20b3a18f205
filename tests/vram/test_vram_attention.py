import json
from pathlib import Path

import pytest

from vram.attention import num_splits
from vram.estimate import estimate
from vram.gpu import device_named
from vram.units import GIB

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
H200 = device_named("H200")


def _grown(model: str, **args: object) -> float:
    """What the device held more once many short prompts beside long ones had run, GiB."""
    for file in sorted(RESULTS.glob("memory_h200_*.jsonl")):
        for line in file.read_text().splitlines():
            load = json.loads(line)
            if load["model"] == model and args.items() <= load["args"].items():
                before = load.get("device_used_after_64_requests_gib")
                if before and "device_used_after_hard_load_gib" in load:
                    return load["device_used_after_hard_load_gib"] - before
    raise AssertionError(f"no such load: {model} {args}")


@pytest.mark.parametrize(
    ("query_tiles", "splits"), [(1, 109), (2, 57), (4, 29), (8, 15), (16, 8), (32, 4), (106, 1)]
)
def test_a_step_is_split_until_the_card_is_busy(query_tiles: int, splits: int) -> None:
    assert num_splits(query_tiles, context_blocks=1000) == splits


def test_a_short_context_is_not_split() -> None:
    assert num_splits(1, context_blocks=4) == 1


@pytest.mark.parametrize(
    ("model", "args"),
    [
        ("llama-3.1-8b", {"max_model_len": 131072, "gpu_memory_utilization": 0.9}),
        ("qwen2.5-32b", {"max_model_len": 8192, "gpu_memory_utilization": 0.9}),
        ("qwen2.5-7b", {"max_model_len": 8192, "tensor_parallel_size": 2}),
        ("gemma-2-9b", {"max_model_len": 8192}),
        ("deepseek-v2-lite", {"max_model_len": 16384, "gpu_memory_utilization": 0.8}),
        ("gpt-oss-20b", {"max_num_seqs": 256, "max_model_len": 32768}),
        ("mixtral-8x7b", {"max_model_len": 32768, "enforce_eager": True}),
        ("llama-2-7b", {"max_model_len": 4096, "max_num_batched_tokens": 8192}),
    ],
)
def test_the_outputs_of_the_splits_are_what_the_device_grew_by(
    model: str, args: dict[str, object], shape_of, settings_with
) -> None:
    found = estimate(shape_of(model), settings_with(**args), H200)
    grown = (found.device_use_at_peak_bytes - found.device_use_under_load_bytes) / GIB
    assert grown == pytest.approx(_grown(model, **args), abs=0.02)


def test_other_cards_and_engines_have_no_such_buffer(shape_of, settings_with) -> None:
    shape, settings = shape_of("llama-3.1-8b"), settings_with()
    for card, engine in (("A100-80GB", "vllm"), ("H200", "transformers")):
        found = estimate(shape, settings, device_named(card), engine)
        assert found.item("split_accumulators").bytes == 0
        assert found.device_use_at_peak_bytes == found.device_use_under_load_bytes
