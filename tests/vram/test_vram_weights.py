from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vram.model import ModelShape
from vram.quantization import Quantization, named
from vram.settings import EngineSettings
from vram.units import GIB
from vram.weights import layers_per_stage, weight_bytes

MODELS = ("qwen2.5-7b", "llama-3.1-8b", "qwen3-30b-a3b", "gemma-2-9b", "mixtral-8x7b")


def test_float32_is_twice_16_bits(shape_of, settings_with) -> None:
    shape = shape_of("qwen2.5-0.5b")
    half = weight_bytes(shape, settings_with(), rounded=False)
    assert weight_bytes(shape, settings_with(dtype="float32"), rounded=False) == 2 * half


def test_a_card_holds_more_than_the_parameters_where_tensors_are_not_whole_pieces(
    shape_of, settings_with
) -> None:
    # Measured on an H200 with vLLM 0.26: 14.29 GiB, for 14.18 GiB of parameters.
    size_bytes = weight_bytes(shape_of("qwen2.5-7b"), settings_with(), rounded=True)
    assert size_bytes / GIB == pytest.approx(14.29, abs=0.005)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pipeline", [1, 2])
def test_splitting_over_more_gpus_never_raises_the_weights_of_one(
    name: str, pipeline: int, shape_of, settings_with
) -> None:
    shape = shape_of(name)
    sizes = [
        weight_bytes(
            shape,
            settings_with(tensor_parallel_size=degree, pipeline_parallel_size=pipeline),
            rounded=True,
        )
        for degree in (1, 2, 4)
    ]
    assert sizes == sorted(sizes, reverse=True)


@given(num_layers=st.integers(1, 200), stages=st.integers(1, 16))
def test_a_pipeline_loses_no_layer_and_is_even_to_one(num_layers: int, stages: int) -> None:
    layers = layers_per_stage(num_layers, min(stages, num_layers))
    assert sum(layers) == num_layers
    assert max(layers) - min(layers) <= 1


def test_a_split_with_more_gpus_than_kv_heads_keeps_one_head_each(
    shape_of: Callable[[str], ModelShape], settings_with: Callable[..., EngineSettings]
) -> None:
    shape = shape_of("qwen2.5-7b")  # 4 key-value heads
    four = weight_bytes(shape, settings_with(tensor_parallel_size=4), rounded=False)
    two_kv_rows_bytes = 2 * shape.head_dim * shape.hidden_size * 2 * shape.num_layers
    fourteen = weight_bytes(shape, settings_with(tensor_parallel_size=14), rounded=False)
    assert fourteen > four * 4 // 14 + two_kv_rows_bytes // 2


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128**2),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
            },
            8,
        ),
    ],
)
def test_a_quantised_checkpoint_counts_its_scales(config: dict[str, object], bits: float) -> None:
    quantization = Quantization.from_config(config)
    assert quantization is not None
    assert quantization.bits_per_weight == pytest.approx(bits)


def test_awq_leaves_the_embeddings_alone(shape_of, settings_with) -> None:
    # Qwen2.5-7B-Instruct-AWQ is published with 5.57 GB of safetensors.
    shape = replace(shape_of("qwen2.5-7b"), quantization=named("awq"))
    size_bytes = weight_bytes(shape, settings_with(dtype="float16"), rounded=False)
    assert size_bytes == pytest.approx(5.57e9, rel=0.01)


def test_online_fp8_is_what_the_engine_is_asked_to_make(shape_of, settings_with) -> None:
    shape = shape_of("llama-3.1-8b")
    size_bytes = weight_bytes(shape, settings_with(quantization="fp8"), rounded=True)
    assert 8.4 < size_bytes / GIB < 8.6
