import pytest

from vram.errors import DoesNotFit
from vram.estimate import estimate
from vram.gpu import cpu_device, device_named
from vram.plan import Wishes, plan
from vram.precheck import precheck
from vram.units import GIB

H200 = device_named("H200")


def test_a_load_that_is_safe_is_left_alone(shape_of, settings_with) -> None:
    checked = precheck(shape_of("qwen2.5-7b"), settings_with(), H200, 139 * GIB, "vllm", "qwen")
    assert not checked.changed
    assert checked.settings == settings_with()
    assert checked.line.endswith("139.0 GiB available; nothing changed.")


def test_the_share_falls_to_what_is_free(shape_of, settings_with) -> None:
    shape = shape_of("qwen2.5-7b")
    checked = precheck(shape, settings_with(), H200, 100 * GIB, "vllm", "qwen")
    share = checked.settings.gpu_memory_utilization
    assert checked.changed
    assert share < 0.72
    assert estimate(shape, checked.settings, H200).device_use_under_load_bytes <= 100 * GIB
    assert checked.line == (
        "qwen at 8192 tokens asks for 0.90 of an H200 (125.8 GiB), short of memory: needs "
        f"129.1 GiB, 100.0 GiB available; gpu_memory_utilization 0.90 → {share:.2f}."
    )
    assert (
        f"显存不足：需要 129.1 GiB，可用 100.0 GiB；gpu_memory_utilization 0.90 → {share:.2f}"
        in (checked.line_zh)
    )


def test_the_share_rises_where_that_is_what_helps(shape_of, settings_with) -> None:
    settings = settings_with(gpu_memory_utilization=0.1, max_model_len=32768)
    checked = precheck(shape_of("qwen2.5-7b"), settings, H200, 130 * GIB)
    assert 0.13 <= checked.settings.gpu_memory_utilization <= 0.15
    assert estimate(shape_of("qwen2.5-7b"), checked.settings, H200).fits


def test_when_nothing_helps_the_error_says_what_would(shape_of, settings_with) -> None:
    with pytest.raises(DoesNotFit) as caught:
        precheck(shape_of("qwen2.5-7b"), settings_with(), H200, 12 * GIB, "vllm", "qwen")
    assert caught.value.available_bytes == 12 * GIB
    assert caught.value.needed_bytes > 14 * GIB
    assert "GPUs" in caught.value.would_fit


def test_on_the_cpu_the_bytes_of_the_cache_shrink_with_the_share(shape_of) -> None:
    shape, device = shape_of("qwen2.5-0.5b"), cpu_device(12 * GIB)
    found = plan(shape, Wishes(max_model_len=4096), device)
    assert found.settings.kv_cache_memory_bytes is not None
    available_bytes = found.estimate.total_bytes - GIB
    checked = precheck(shape, found.settings, device, available_bytes, "vllm", "demo")
    assert checked.settings.kv_cache_memory_bytes == found.settings.kv_cache_memory_bytes - GIB
    assert checked.settings.gpu_memory_utilization < found.settings.gpu_memory_utilization
    assert "KV cache" in checked.line
    assert "内存不足" in checked.line_zh
    assert estimate(shape, checked.settings, device).total_bytes <= available_bytes
