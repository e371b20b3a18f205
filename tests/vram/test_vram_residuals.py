"""What is learned of loads, and what of it is believed."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vram.estimate import estimate
from vram.gpu import cpu_device, device_named
from vram.residuals import (
    HIGHEST_RATIO,
    LARGEST_DIFFERENCE_BYTES,
    NEWEST_LOADS,
    Residuals,
    Seen,
    load_kind,
    residuals,
)
from vram.settings import EngineSettings
from vram.units import GIB, MIB

H200 = device_named("H200")
SIZES = st.integers(min_value=0, max_value=1 << 40)
SETTINGS = EngineSettings(
    dtype="bfloat16",
    quantization=None,
    kv_cache_dtype="auto",
    max_model_len=8192,
    max_num_seqs=1024,
    max_num_batched_tokens=16384,
    gpu_memory_utilization=0.9,
    kv_cache_memory_bytes=None,
    tensor_parallel_size=1,
    pipeline_parallel_size=1,
    enforce_eager=False,
)
ITEMS = ("weights", "peak_activation", "cuda_graphs", "non_torch", "device_use")


def learned(settings, *loads: Seen) -> Residuals:
    return residuals(load_kind(settings, H200, "vllm"), "0.29.0", loads)


def load(item: str, estimated: int, measured: int) -> Seen:
    return Seen(estimated={item: estimated}, measured={item: measured})


def test_weights_are_what_they_were_and_activations_keep_their_ratio(settings_with) -> None:
    found = learned(
        settings_with(),
        Seen(
            estimated={"weights": 10 * GIB, "peak_activation": 2 * GIB, "non_torch": 200 * MIB},
            measured={"weights": 11 * GIB, "peak_activation": 3 * GIB, "non_torch": 300 * MIB},
        ),
    )
    assert found.corrected("weights", 10 * GIB) == 11 * GIB
    assert found.corrected("peak_activation", 4 * GIB) == 6 * GIB
    assert found.corrected("non_torch", 230 * MIB) == 330 * MIB
    assert found.corrected("communication", 5) == 5


def test_the_middle_of_the_newest_loads_counts(settings_with) -> None:
    old = [load("non_torch", GIB, 5 * GIB)] * 20
    new = [load("non_torch", GIB, GIB + n * MIB) for n in range(NEWEST_LOADS)]
    assert learned(settings_with(), *old, *new).corrected("non_torch", GIB) == (
        GIB + int((NEWEST_LOADS - 1) / 2 * MIB)
    )


def test_a_device_that_held_less_is_no_reason_to_expect_less(settings_with) -> None:
    """It may have been asked before the hardest batch."""
    below = learned(settings_with(), load("device_use", 100 * GIB, 90 * GIB))
    above = learned(settings_with(), load("device_use", 100 * GIB, 101 * GIB))
    assert below.corrected("device_use", 50 * GIB) == 50 * GIB
    assert above.corrected("device_use", 50 * GIB) == 51 * GIB


def test_nothing_is_added_to_what_is_not_there(settings_with) -> None:
    found = learned(settings_with(), load("cuda_graphs", GIB, 2 * GIB))
    assert found.corrected("cuda_graphs", 0) == 0


@given(estimated=SIZES, measured=SIZES, size_bytes=SIZES, item=st.sampled_from(ITEMS))
def test_no_measurement_moves_an_item_beyond_its_bounds(
    estimated: int, measured: int, size_bytes: int, item: str
) -> None:
    kind = load_kind(SETTINGS, H200, "vllm")
    found = residuals(kind, "1", [load(item, estimated, measured)])
    corrected = found.corrected(item, size_bytes)
    assert corrected >= 0
    if item == "weights":
        assert corrected in (size_bytes, measured)
        assert corrected == size_bytes or corrected <= HIGHEST_RATIO * estimated
    else:
        most = max(HIGHEST_RATIO * size_bytes, size_bytes + LARGEST_DIFFERENCE_BYTES)
        assert corrected <= most


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"quantization": "fp8"},
        {"kv_cache_dtype": "fp8"},
        {"enforce_eager": True},
        {"expert_parallel": True},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"max_loras": 4},
        {"num_speculative_tokens": 3},
        {"max_cudagraph_capture_size": 64},
        {"expandable_segments": True},
    ],
)
def test_what_makes_other_code_run_is_another_kind(changes, settings_with) -> None:
    settings = settings_with()
    assert load_kind(settings, H200, "vllm") != load_kind(
        replace(settings, **changes), H200, "vllm"
    )


def test_context_batch_and_share_are_of_one_kind(settings_with) -> None:
    other = settings_with(
        max_model_len=1024, max_num_batched_tokens=2048, gpu_memory_utilization=0.5
    )
    assert load_kind(settings_with(), H200, "vllm") == load_kind(other, H200, "vllm")


def test_an_estimate_with_residuals_gives_to_the_cache_what_the_items_do_not_take(
    shape_of, settings_with
) -> None:
    shape, settings = shape_of("qwen2.5-7b"), settings_with()
    formula = estimate(shape, settings, H200)
    seen = {
        "weights": formula.item("weights").bytes + GIB,
        "peak_activation": formula.item("peak_activation").bytes,
        "device_use": formula.device_use_at_peak_bytes + 3 * GIB,
    }
    said = {item.name: item.bytes for item in formula.items}
    said["device_use"] = formula.device_use_at_peak_bytes
    found = learned(settings, Seen(estimated=said, measured=seen))
    after = estimate(replace(shape, learned=(found,)), settings, H200)
    assert after.item("weights").bytes == formula.item("weights").bytes + GIB
    assert after.item("kv_cache").bytes == formula.item("kv_cache").bytes - GIB
    assert after.total_bytes == formula.total_bytes
    assert after.device_use_under_load_bytes == formula.device_use_under_load_bytes + 3 * GIB
    assert "0.29.0" in after.item("weights").source


def test_residuals_of_another_kind_change_nothing(shape_of, settings_with) -> None:
    shape, settings = shape_of("qwen2.5-7b"), settings_with()
    found = learned(settings, load("weights", 14 * GIB, 20 * GIB))
    shape = replace(shape, learned=(found,))
    eager = settings_with(enforce_eager=True)
    assert estimate(shape, eager, H200) == estimate(replace(shape, learned=()), eager, H200)
    cpu = cpu_device(64 * GIB)
    assert estimate(shape, settings, cpu) == estimate(replace(shape, learned=()), settings, cpu)


def test_what_was_learned_reaches_the_reason_of_a_refusal(shape_of, settings_with) -> None:
    shape = shape_of("qwen2.5-7b")
    settings = settings_with(gpu_memory_utilization=0.95)
    assert estimate(shape, settings, H200).fits
    found = learned(settings, load("device_use", 100 * GIB, 108 * GIB))
    after = estimate(replace(shape, learned=(found,)), settings, H200)
    assert "Under load" in after.reason
