from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vram.gpu import cpu_device, device_named
from vram.kv_cache import CacheLayout, PageGroup, cache_layout
from vram.units import GIB

H200 = device_named("H200")


def test_llama_2_7b_takes_half_a_mebibyte_a_token(shape_of, settings_with) -> None:
    # The course's example: 16 sequences of 2048 tokens are 16 GiB.
    layout = cache_layout(shape_of("llama-2-7b"), settings_with(max_model_len=2048), H200, "vllm")
    assert 16 * layout.sequence_bytes(2048) == 16 * GIB


def test_fp8_halves_the_cache(shape_of, settings_with) -> None:
    shape = shape_of("llama-3.1-8b")
    full = cache_layout(shape, settings_with(), H200, "vllm")
    fp8 = cache_layout(shape, settings_with(kv_cache_dtype="fp8"), H200, "vllm")
    assert full.token_bytes == 2 * fp8.token_bytes


def test_a_scale_per_token_and_head_is_counted(shape_of, settings_with) -> None:
    shape = shape_of("llama-3.1-8b")
    for name in ("int8_per_token_head", "fp8_per_token_head"):
        layout = cache_layout(shape, settings_with(kv_cache_dtype=name), H200, "vllm")
        assert layout.token_bytes == 32 * 2 * 8 * (128 + 4)


def test_a_gpu_keeps_one_whole_head_when_there_are_fewer_heads_than_gpus(
    shape_of, settings_with
) -> None:
    shape = shape_of("llama-3.1-8b")  # 8 key-value heads
    eight = cache_layout(shape, settings_with(tensor_parallel_size=8), H200, "vllm")
    sixteen = cache_layout(shape, settings_with(tensor_parallel_size=16), H200, "vllm")
    assert eight.token_bytes == sixteen.token_bytes


def test_vllm_pages_by_128_tokens_on_the_cpu(shape_of, settings_with) -> None:
    layout = cache_layout(shape_of("qwen2.5-0.5b"), settings_with(), cpu_device(GIB), "vllm")
    assert layout.sequence_bytes(1) == layout.sequence_bytes(128) < layout.sequence_bytes(129)


def test_gemma_2_is_two_groups_and_its_windows_save_memory(shape_of, settings_with) -> None:
    settings = settings_with(max_num_batched_tokens=512)
    layout = cache_layout(shape_of("gemma-2-9b"), settings, H200, "vllm")
    assert [group.window_tokens for group in layout.groups] == [None, 4096]
    assert layout.sequence_bytes(8192) < 8192 * layout.token_bytes


layouts = st.builds(
    CacheLayout,
    groups=st.sampled_from(
        [
            (PageGroup(page_bytes=4096),),
            (PageGroup(page_bytes=4096, window_tokens=128),),
            (
                PageGroup(page_bytes=512),
                PageGroup(page_bytes=512, window_tokens=1024),
                PageGroup(page_bytes=512, fixed_pages=2),
                PageGroup(page_bytes=512, fixed_tokens=1500),
            ),
        ]
    ),
    page_tokens=st.sampled_from([1, 16, 128]),
    token_bytes=st.just(256),
    in_flight_tokens=st.integers(1, 1 << 15),
    pooled=st.booleans(),
)


@given(layout=layouts, tokens=st.integers(1, 1 << 20), more=st.integers(0, 1 << 20))
def test_more_context_never_needs_less_memory(layout: CacheLayout, tokens: int, more: int) -> None:
    assert layout.sequence_bytes(tokens) <= layout.sequence_bytes(tokens + more)


@given(layout=layouts, cache_bytes=st.integers(0, 1 << 36), highest=st.integers(1, 1 << 20))
def test_the_longest_context_fits_and_one_token_more_does_not(
    layout: CacheLayout, cache_bytes: int, highest: int
) -> None:
    tokens = layout.longest_context(cache_bytes, highest)
    assert tokens == 0 or layout.sequence_bytes(tokens) <= cache_bytes
    assert tokens == highest or layout.sequence_bytes(tokens + 1) > cache_bytes


@pytest.mark.parametrize(("cache_gib", "tokens"), [(109.15, 2043840), (0.0, 0)])
def test_tokens_are_whole_pages(cache_gib: float, tokens: int, shape_of, settings_with) -> None:
    layout = cache_layout(shape_of("qwen2.5-7b"), settings_with(), H200, "vllm")
    found = layout.tokens(int(cache_gib * GIB), 8192)
    assert found == pytest.approx(tokens, rel=1e-4)
    assert found % 16 == 0


def test_latent_attention_keeps_one_vector_and_every_gpu_keeps_it(shape_of, settings_with) -> None:
    shape = shape_of("deepseek-v3")
    whole = cache_layout(shape, settings_with(), H200, "vllm")
    eighth = cache_layout(shape, settings_with(tensor_parallel_size=8), H200, "vllm")
    assert whole.token_bytes == eighth.token_bytes == (512 + 64) * 2 * 61


def test_gpt_oss_120b_is_what_vllm_counts(shape_of, settings_with) -> None:
    # hf-mem issue 60: vLLM's 73,728 bytes a token, of which half is in windows of 128.
    layout = cache_layout(shape_of("gpt-oss-120b"), settings_with(), H200, "vllm")
    assert layout.token_bytes == 73_728
    assert [group.window_tokens for group in layout.groups] == [None, 128]


@pytest.mark.parametrize(
    ("name", "page_tokens"),
    # "Setting attention block size to … tokens": computed as platforms/interface.py of vLLM does.
    [("qwen3-next-80b-a3b", 544), ("nemotron-h-8b", 1040), ("jamba-v0.1", 80)],
)
def test_pages_grow_until_a_state_fits_into_one(
    name: str, page_tokens: int, shape_of, settings_with
) -> None:
    shape = shape_of(name)
    layout = cache_layout(shape, settings_with(max_model_len=8192), H200, "vllm")
    assert layout.page_tokens == page_tokens
    assert sum(group.fixed_pages is None for group in layout.groups) == 1


def test_a_state_space_keeps_the_same_for_every_length(shape_of, settings_with) -> None:
    shape = shape_of("falcon-mamba-7b")
    layout = cache_layout(shape, settings_with(), H200, "vllm")
    # 64 layers: 3 tokens of the convolution and 16 numbers of state for each of 8192 channels.
    assert layout.sequence_bytes(1) == layout.sequence_bytes(8192) == 64 * 8192 * (3 + 16) * 2


def test_whisper_keeps_its_encoders_output_beside_its_own_words(shape_of, settings_with) -> None:
    shape = shape_of("whisper-large-v3")
    layout = cache_layout(shape, settings_with(max_model_len=448), H200, "vllm")
    token_bytes = 2 * 1280 * 2 * 32
    assert layout.sequence_bytes(448) == (28 + 94) * 16 * token_bytes


def test_an_encoder_keeps_nothing(shape_of, settings_with) -> None:
    layout = cache_layout(shape_of("bge-m3"), settings_with(), H200, "vllm")
    assert layout.sequence_bytes(8192) == layout.tokens(GIB, 8192) == 0


def test_engines_without_one_pool_pad_no_groups(shape_of, settings_with) -> None:
    settings = settings_with(max_num_batched_tokens=1024, max_model_len=32768)
    pooled = cache_layout(shape_of("gemma-3-1b"), settings, H200, "vllm")
    apart = cache_layout(shape_of("gemma-3-1b"), settings, H200, "transformers")
    assert apart.sequence_bytes(32768) < pooled.sequence_bytes(32768)


def test_a_checkpoint_that_brings_scales_for_an_fp8_cache_gets_one(shape_of, settings_with) -> None:
    shape = replace(shape_of("llama-3.1-8b"), kv_cache_dtype="fp8")
    plain = cache_layout(shape_of("llama-3.1-8b"), settings_with(), H200, "vllm")
    assert 2 * cache_layout(shape, settings_with(), H200, "vllm").token_bytes == plain.token_bytes
