import pytest
from hypothesis import given
from hypothesis import strategies as st

from vram.gpu import cpu_device, device_named
from vram.ladder import fixed_ladder
from vram.plan import Wishes, plan
from vram.units import GIB

H200 = device_named("H200")


def _shares_and_contexts(rungs) -> list[tuple[float, int]]:
    return [(rung.settings.gpu_memory_utilization, rung.settings.max_model_len) for rung in rungs]


def test_the_four_attempts_are_those_of_the_users(shape_of, settings_with) -> None:
    rungs = fixed_ladder(settings_with(max_model_len=32768), shape_of("qwen2.5-7b"), H200)
    assert _shares_and_contexts(rungs) == [(0.9, 32768), (0.7, 32768), (0.6, 4096), (0.5, 2048)]
    assert [rung.price for rung in rungs] == [
        "nothing",
        "utilisation 0.90 → 0.70",
        "utilisation 0.90 → 0.60, context 32768 → 4096 tokens",
        "utilisation 0.90 → 0.50, context 32768 → 2048 tokens",
    ]
    assert not any(rung.skipped_reason for rung in rungs)


def test_a_step_down_never_strands_the_longest_request(shape_of, settings_with) -> None:
    rungs = fixed_ladder(settings_with(), shape_of("qwen2.5-7b"), H200, longest_request_tokens=5000)
    assert [rung.settings.max_model_len for rung in rungs] == [8192, 8192, 5000, 5000]


def test_a_rung_that_is_certain_to_fail_says_so(shape_of, settings_with) -> None:
    # 61 GiB of weights on an 80 GiB card: 0.70 is less than the weights.
    rungs = fixed_ladder(
        settings_with(gpu_memory_utilization=0.95, max_num_batched_tokens=2048),
        shape_of("qwen2.5-32b"),
        device_named("H100"),
    )
    assert rungs[0].skipped_reason is None
    assert all("No room for the KV cache" in str(rung.skipped_reason) for rung in rungs[1:])


def test_a_rung_that_changes_nothing_is_skipped(shape_of, settings_with) -> None:
    rungs = fixed_ladder(
        settings_with(gpu_memory_utilization=0.4, max_model_len=2048),
        shape_of("qwen2.5-7b"),
        H200,
    )
    assert all("changes nothing" in str(rung.skipped_reason) for rung in rungs[1:])


def test_explicit_cache_bytes_shrink_on_every_rung(shape_of) -> None:
    shape, device = shape_of("qwen2.5-0.5b"), cpu_device(12 * GIB)
    found = plan(shape, Wishes(max_model_len=8192), device)
    rungs = fixed_ladder(found.settings, shape, device, "vllm")
    sizes = [rung.settings.kv_cache_memory_bytes or 0 for rung in rungs]
    assert sizes == sorted(set(sizes), reverse=True)
    assert not any(rung.skipped_reason for rung in rungs)


def test_a_cache_that_is_smaller_than_its_budget_shrinks_in_proportion(
    shape_of, settings_with
) -> None:
    settings = settings_with(kv_cache_memory_bytes=9 * GIB)
    rungs = fixed_ladder(settings, shape_of("qwen2.5-7b"), H200)
    sizes_gib = [(rung.settings.kv_cache_memory_bytes or 0) / GIB for rung in rungs]
    assert sizes_gib == pytest.approx([9, 7, 6, 5], abs=1e-6)


@given(
    share=st.floats(0.05, 1.0),
    context_tokens=st.integers(1, 32768),
    longest=st.integers(0, 40000),
    cache_bytes=st.none() | st.integers(1, 64 * GIB),
)
def test_no_rung_is_above_the_users_own_settings(
    share, context_tokens, longest, cache_bytes, shape_of, settings_with
) -> None:
    settings = settings_with(
        gpu_memory_utilization=share,
        max_model_len=context_tokens,
        kv_cache_memory_bytes=cache_bytes,
    )
    for rung in fixed_ladder(settings, shape_of("qwen2.5-7b"), H200, "vllm", longest):
        assert rung.settings.gpu_memory_utilization <= share
        assert min(longest, context_tokens) <= rung.settings.max_model_len <= context_tokens
        assert (rung.settings.kv_cache_memory_bytes or 0) <= (cache_bytes or 0)
