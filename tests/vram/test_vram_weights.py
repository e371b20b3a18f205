import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vram.adapters import adapter_bytes
from vram.model import ModelShape
from vram.quantization import Quantization
from vram.settings import EngineSettings
from vram.units import GIB
from vram.weights import checkpoint_bits, layers_per_stage, weight_bytes

CONFIGS = Path(__file__).parent / "configs"
MODELS = (
    "qwen2.5-7b",
    "llama-3.1-8b",
    "qwen3-30b-a3b",
    "gemma-2-9b",
    "mixtral-8x7b",
    "deepseek-v3",
    "gpt-oss-20b",
    "jamba-v0.1",
    "qwen3-next-80b-a3b",
    "nemotron-h-8b",
    "falcon-mamba-7b",
    "qwen2.5-vl-7b",
    "whisper-large-v3",
    "bge-m3",
    "qwen2.5-7b-awq",
)


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
    two_kv_rows_bytes = 2 * 128 * shape.hidden_size * 2 * shape.num_layers
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
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8.0078),
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
    found = quantization.schemes[0].packing.bits_per_weight(rows=1024, columns=4096)
    assert found == pytest.approx(bits, rel=0.01)


def test_unquantised_modules_are_found_by_name_and_by_pattern(shape_of) -> None:
    config = json.loads((CONFIGS / "qwen3-30b-a3b-fp8" / "config.json").read_text())
    everything = ModelShape.from_config(config)
    config["quantization_config"]["modules_to_not_convert"] = ["re:.*self_attn.*", "lm_head"]
    plain_attention = ModelShape.from_config(config)
    attention_elements = 48 * 2048 * (2 * 4096 + 2 * 512)
    more_bits = checkpoint_bits(plain_attention) - checkpoint_bits(everything)
    assert more_bits == pytest.approx(8 * attention_elements, rel=0.001)


def test_a_kind_of_layer_becomes_two_where_only_some_are_quantised() -> None:
    config = json.loads((CONFIGS / "qwen3-32b-fp8" / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["model.layers.3.mlp.down_proj"]
    shape = ModelShape.from_config(config)
    assert len(shape.kinds) == 2
    assert [index for index, kind in enumerate(shape.order) if kind == 1] == [3]


def test_experts_are_handed_out_whole_when_asked(shape_of, settings_with) -> None:
    # 60 experts of 1408 rows over 8 GPUs: 8 whole ones at most, against 60 eighths.
    shape = shape_of("qwen1.5-moe-a2.7b")
    sliced = weight_bytes(shape, settings_with(tensor_parallel_size=8), rounded=False)
    settings = settings_with(tensor_parallel_size=8, expert_parallel=True)
    expert_bytes = 3 * 2048 * 1408 * 2
    handed_out = weight_bytes(shape, settings, rounded=False)
    assert handed_out - sliced == 24 * expert_bytes * (8 - 60 / 8)


def test_adapters_take_two_factors_for_each_projection(shape_of, settings_with) -> None:
    shape = shape_of("llama-3.1-8b")
    found = adapter_bytes(shape, settings_with(max_loras=2, max_lora_rank=16))
    per_layer = 3 * 4096 + 6144 + 2 * 4096 + 2 * 4096 + 28672 + 14336 + 4096
    vocabulary = 2 * (128256 + 4096)  # embedding and head
    assert found == 2 * 16 * (32 * per_layer + vocabulary) * 2
    assert adapter_bytes(shape, settings_with()) == 0


def test_adapters_have_factors_for_every_expert(shape_of, settings_with) -> None:
    shape = shape_of("qwen1.5-moe-a2.7b")
    sliced = settings_with(max_loras=1, max_lora_rank=1, tensor_parallel_size=2)
    whole = settings_with(
        max_loras=1, max_lora_rank=1, tensor_parallel_size=2, expert_parallel=True
    )
    # Of 60 experts: gate and up 2 x 2048 in and 1408 out, down 1408 in and 2048 out.
    split_bytes = 60 * (2 * 2048 + 1408 + 704 + 2048) * 24 * 2
    handed_bytes = 30 * (2 * 2048 + 2 * 1408 + 1408 + 2048) * 24 * 2
    difference = adapter_bytes(shape, sliced) - adapter_bytes(shape, whole)
    assert difference == split_bytes - handed_bytes


def test_deepseeks_absorbed_matrices_are_held_and_not_counted_as_parameters(
    shape_of, settings_with
) -> None:
    shape = shape_of("deepseek-v2-lite")
    absorbed_bytes = 27 * 16 * (128 + 128) * 512 * 2
    held = weight_bytes(shape, settings_with(max_model_len=1024), rounded=False)
    rope_bytes = shape.rope_elements * 2
    assert held == pytest.approx(2 * shape.parameter_count + absorbed_bytes + rope_bytes, abs=1e5)


@pytest.mark.parametrize(
    ("name", "measured_gib"),
    # H200, vLLM 0.26: the blocks of the 16-bit weights are used again, 14B's do not fit well.
    [("qwen2.5-7b", 8.20), ("qwen2.5-14b", 16.15)],
)
def test_online_fp8_is_packed_into_the_blocks_that_its_originals_left(
    name: str, measured_gib: float, shape_of, settings_with
) -> None:
    size_bytes = weight_bytes(shape_of(name), settings_with(quantization="fp8"), rounded=True)
    assert size_bytes / GIB == pytest.approx(measured_gib, rel=0.01)


def test_every_tensor_from_ten_mebibytes_on_is_rounded(shape_of, settings_with) -> None:
    # Measured: 1.956 GiB, for 1.862 of parameters and 0.031 of positions.
    size_bytes = weight_bytes(shape_of("gemma-3-1b"), settings_with(), rounded=True)
    assert size_bytes / GIB == pytest.approx(1.956, abs=0.002)
