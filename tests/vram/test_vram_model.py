import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vram.errors import Invalid, UnknownArchitecture, UnknownDtype
from vram.model import ModelShape

# What the safetensors of the published checkpoints sum to (the Hub's model pages).
PUBLISHED_PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b": 7_248_023_552,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2-9b": 9_241_705_984,
    "mixtral-8x7b": 46_702_792_704,
}
SMALLEST = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize(("name", "published"), PUBLISHED_PARAMETERS.items())
def test_the_parameter_count_is_the_published_one(
    name: str, published: int, shape_of: Callable[[str], ModelShape]
) -> None:
    assert shape_of(name).parameter_count == published


def test_every_config_here_has_a_published_count() -> None:
    assert {path.name for path in (Path(__file__).parent / "configs").iterdir()} == set(
        PUBLISHED_PARAMETERS
    )


def test_gemma_2_windows_every_other_layer(shape_of: Callable[[str], ModelShape]) -> None:
    window = shape_of("gemma-2-9b").window
    assert window is not None
    assert (window.num_layers, window.tokens) == (21, 4096)


def test_a_qwen_window_that_is_switched_off_is_none(
    shape_of: Callable[[str], ModelShape],
) -> None:
    assert shape_of("qwen3-8b").window is None


def test_absent_key_value_heads_are_the_attention_heads() -> None:
    assert ModelShape.from_config(SMALLEST).num_kv_heads == 4


def test_an_unknown_architecture_is_named_and_not_guessed() -> None:
    with pytest.raises(UnknownArchitecture, match="FooForCausalLM"):
        ModelShape.from_config(SMALLEST | {"architectures": ["FooForCausalLM"]})


@pytest.mark.parametrize("key", [key for key in SMALLEST if key != "architectures"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(Invalid, match=key):
        ModelShape.from_config({k: v for k, v in SMALLEST.items() if k != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", -64),
        ("hidden_size", 0),
        ("hidden_size", "64"),
        ("hidden_size", True),
        ("hidden_size", 64.0),
        ("num_hidden_layers", 10**12),
        ("num_hidden_layers", 10**4000),
        ("num_key_value_heads", 3),
        ("vocab_size", []),
        ("max_position_embeddings", {"a": 1}),
        ("tie_word_embeddings", "yes"),
        ("torch_dtype", 16),
        ("architectures", "LlamaForCausalLM"),
        ("quantization_config", 4),
        ("quantization_config", {"quant_method": "rot13"}),
    ],
)
def test_a_hostile_value_is_one_clear_error(key: str, value: object) -> None:
    with pytest.raises(Invalid) as caught:
        ModelShape.from_config(SMALLEST | {key: value})
    assert len(str(caught.value)) < 300


def test_an_unknown_dtype_lists_the_known_ones() -> None:
    with pytest.raises(UnknownDtype, match="bfloat16"):
        ModelShape.from_config(SMALLEST | {"torch_dtype": "float8"})


def test_a_config_that_is_a_list_is_refused() -> None:
    with pytest.raises(Invalid, match="not an object"):
        ModelShape.from_config(json.loads("[]"))
