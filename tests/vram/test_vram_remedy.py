"""Each remedy is true: with its settings the model fits."""

from dataclasses import replace

import pytest

from vram.estimate import estimate
from vram.gpu import device_named
from vram.remedy import remedies

H200 = device_named("H200")


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("qwen2.5-7b", {"gpu_memory_utilization": 0.12, "max_model_len": 32768}),
        ("qwen2.5-72b", {"max_model_len": 4096}),
        ("llama-3.1-8b", {"gpu_memory_utilization": 0.99, "max_model_len": 131072}),
        ("qwen2.5-7b", {"kv_cache_memory_bytes": 1000}),
        ("falcon-mamba-7b", {"gpu_memory_utilization": 0.15, "max_num_seqs": 1024}),
    ],
)
def test_every_remedy_fits(model: str, changes, shape_of, settings_with) -> None:
    shape, settings = shape_of(model), settings_with(**changes)
    assert not estimate(shape, settings, H200).fits
    found = remedies(shape, settings, H200, "vllm", H200.total_bytes)
    assert found
    for remedy in found:
        turned = replace(settings, **{remedy.setting: remedy.value}, **dict(remedy.also))
        assert estimate(shape, turned, H200).fits, remedy


def test_the_remedies_of_a_share_too_small_are_more_of_it_or_a_shorter_context(
    shape_of, settings_with
) -> None:
    shape = shape_of("qwen2.5-7b")
    # 0.13 leaves room for half the context.
    settings = settings_with(
        gpu_memory_utilization=0.13, max_model_len=32768, max_num_batched_tokens=2048
    )
    found = remedies(shape, settings, H200, "vllm", H200.total_bytes)
    assert [remedy.setting for remedy in found[:2]] == ["gpu_memory_utilization", "max_model_len"]
    assert found[1].also == ()


def test_where_more_of_the_card_suffices_no_other_remedy_asks_for_it_as_well(
    shape_of, settings_with
) -> None:
    settings = settings_with(gpu_memory_utilization=0.1, max_model_len=32768)
    found = remedies(shape_of("qwen2.5-7b"), settings, H200, "vllm", H200.total_bytes)
    assert found[0].setting == "gpu_memory_utilization"
    assert all(remedy.also == () for remedy in found)
