import pytest
from hypothesis import given
from hypothesis import strategies as st

from vram.errors import DoesNotFit, Invalid
from vram.gpu import cpu_device, device_named
from vram.model import ModelShape
from vram.plan import Plan, Wishes, plan
from vram.units import GIB

H200 = device_named("H200")
TINY = ModelShape.from_config(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "torch_dtype": "float32",
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "max_position_embeddings": 2048,
    }
)


def test_with_no_wishes_a_model_gets_its_whole_context(shape_of) -> None:
    found = plan(shape_of("qwen2.5-7b"), Wishes(), H200)
    assert found.settings.max_model_len == 32768
    assert found.settings.gpu_memory_utilization == 0.9
    assert found.settings.tensor_parallel_size == 1
    assert found.notes == ()


def test_pins_are_kept_to_the_letter(shape_of) -> None:
    wishes = Wishes(
        max_model_len=4096,
        max_num_seqs=7,
        max_num_batched_tokens=1024,
        gpu_memory_utilization=0.5,
        kv_cache_dtype="fp8",
        dtype="float16",
        quantization="fp8",
        tensor_parallel_size=2,
        pipeline_parallel_size=2,
        enforce_eager=True,
    )
    settings = plan(shape_of("llama-3.1-8b"), wishes, H200).settings
    for setting in Wishes.__slots__:
        pinned = getattr(wishes, setting)
        if pinned is not None and setting != "max_gpus":
            assert getattr(settings, setting) == pinned, setting


def test_the_context_shrinks_to_the_card_when_it_is_not_pinned(shape_of) -> None:
    found = plan(shape_of("llama-3.1-8b"), Wishes(), device_named("RTX 4090"))
    assert 30_000 < found.settings.max_model_len < 131_072
    assert any("max_model_len 131072" in note for note in found.notes)


def test_a_pinned_context_that_does_not_fit_is_refused_with_what_does(shape_of) -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan(
            shape_of("llama-3.1-8b"),
            Wishes(max_model_len=131072),
            device_named("RTX 4090"),
            name="Llama-3.1-8B",
        )
    error = caught.value
    assert error.setting == "max_model_len"
    assert error.needed_bytes > error.available_bytes
    assert str(error).startswith("Llama-3.1-8B at 131072 tokens on an RTX4090 needs 33.")
    assert "on 2 GPUs" in error.would_fit
    tokens = int(error.would_fit.removeprefix("It fits at ").split()[0])
    assert plan(
        shape_of("llama-3.1-8b"), Wishes(max_model_len=tokens), device_named("RTX 4090")
    ).estimate.fits


def test_a_pinned_share_that_is_too_small_is_told_to_grow(shape_of) -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan(
            shape_of("qwen2.5-7b"),
            Wishes(max_model_len=32768, gpu_memory_utilization=0.1),
            H200,
        )
    assert caught.value.setting == "gpu_memory_utilization"
    share = float(caught.value.would_fit.split("gpu_memory_utilization ")[1][:4])
    assert plan(
        shape_of("qwen2.5-7b"), Wishes(max_model_len=32768, gpu_memory_utilization=share), H200
    ).estimate.fits


def test_too_big_weights_ask_for_more_gpus(shape_of) -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan(shape_of("qwen2.5-72b"), Wishes(), H200)
    assert caught.value.setting == "tensor_parallel_size"


def test_the_smallest_split_that_fits_is_taken_when_more_gpus_are_allowed(shape_of) -> None:
    assert plan(shape_of("qwen2.5-72b"), Wishes(max_gpus=8), H200).settings.num_gpus == 2
    assert plan(shape_of("qwen2.5-7b"), Wishes(max_gpus=8), H200).settings.num_gpus == 1


def test_a_share_of_a_card_is_not_exceeded_under_load(shape_of) -> None:
    found = plan(shape_of("qwen2.5-7b"), Wishes(gpu_fraction=0.3), H200)
    assert found.gpu_fraction == 0.3
    assert found.settings.gpu_memory_utilization < 0.3
    assert found.estimate.device_use_under_load_bytes <= 0.3 * H200.total_bytes


def test_on_the_cpu_the_cache_is_in_bytes_and_no_larger_than_useful() -> None:
    settings = plan(TINY, Wishes(max_num_seqs=8, max_model_len=1024), cpu_device(4 * GIB)).settings
    token_bytes = 2 * 2 * 16 * 4 * 4
    assert settings.kv_cache_memory_bytes == 8 * 1024 * token_bytes
    assert settings.enforce_eager


def test_on_the_cpu_bfloat16_becomes_float32(shape_of) -> None:
    found = plan(shape_of("qwen2.5-0.5b"), Wishes(), cpu_device(8 * GIB))
    assert found.settings.dtype == "float32"
    assert any("bfloat16" in note for note in found.notes)


def test_too_little_ram_names_the_ram_that_is_enough() -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan(TINY, Wishes(), cpu_device(GIB))
    assert caught.value.setting == "memory"
    enough_gib = float(caught.value.would_fit.split()[3])
    assert plan(TINY, Wishes(), cpu_device(int(enough_gib * GIB))).estimate.fits


def test_an_old_card_computes_in_float16(shape_of) -> None:
    found = plan(shape_of("qwen2.5-0.5b"), Wishes(), device_named("T4"))
    assert found.settings.dtype == "float16"
    with pytest.raises(Invalid, match="no bfloat16"):
        plan(shape_of("qwen2.5-0.5b"), Wishes(dtype="bfloat16"), device_named("T4"))


@pytest.mark.parametrize(
    ("wishes", "setting"),
    [
        (Wishes(max_model_len=0), "max_model_len"),
        (Wishes(max_model_len=10**9), "max_model_len"),
        (Wishes(max_model_len=40000), "max_model_len"),
        (Wishes(gpu_fraction=0.0), "gpu_fraction"),
        (Wishes(gpu_fraction=1.5), "gpu_fraction"),
        (Wishes(gpu_fraction=0.5, tensor_parallel_size=2), "gpu_fraction"),
        (Wishes(tensor_parallel_size=3), "tensor_parallel_size"),
        (Wishes(max_num_seqs=4096, max_num_batched_tokens=1024), "max_num_seqs"),
        (Wishes(quantization="gptq"), "quantization"),
        (Wishes(dtype="int3"), "dtype"),
    ],
)
def test_an_impossible_wish_is_refused_by_its_name(wishes, setting, shape_of) -> None:
    with pytest.raises(Invalid) as caught:
        plan(shape_of("qwen2.5-7b"), wishes, H200)
    assert caught.value.setting == setting


wishes = st.builds(
    Wishes,
    max_model_len=st.none() | st.integers(1, 32768),
    max_num_seqs=st.none() | st.integers(1, 2048),
    gpu_memory_utilization=st.none() | st.floats(0.05, 1.0),
    kv_cache_dtype=st.none() | st.just("fp8"),
    quantization=st.none() | st.just("fp8"),
    enforce_eager=st.none() | st.booleans(),
    gpu_fraction=st.none() | st.floats(0.05, 1.0),
    max_gpus=st.sampled_from([1, 2, 8]),
)


@given(
    name=st.sampled_from(["qwen2.5-0.5b", "qwen2.5-7b", "gemma-2-9b", "qwen3-30b-a3b"]),
    card=st.sampled_from(["T4", "L4", "A100-80GB", "H200"]),
    engine=st.sampled_from(["vllm", "transformers", "sglang"]),
    wished=wishes,
)
def test_a_plan_never_exceeds_its_share_of_a_card(name, card, engine, wished, shape_of) -> None:
    device = device_named(card)
    try:
        found: Plan = plan(shape_of(name), wished, device, engine)
    except Invalid:
        return
    assert found.estimate.fits
    limit_bytes = device.total_bytes * found.gpu_fraction
    assert found.estimate.device_use_under_load_bytes <= limit_bytes
    assert found == plan(shape_of(name), wished, device, engine)


def test_fewer_sequences_are_not_taken_where_the_cache_would_outgrow_the_card(shape_of) -> None:
    device = device_named("T4")
    wishes = Wishes(enforce_eager=True, max_gpus=2)
    found = plan(shape_of("gemma-2-9b"), wishes, device, "sglang")
    assert found.estimate.device_use_under_load_bytes <= device.total_bytes
