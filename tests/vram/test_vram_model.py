import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vram.errors import Invalid, UnknownArchitecture, UnknownDtype
from vram.model import ModelShape
from vram.parts import KeysAndValues
from vram.weights import checkpoint_bits

PUBLISHED = {
    name: entry
    for name, entry in json.loads((Path(__file__).parent / "published.json").read_text()).items()
    if name != "_"
}
COUNTED = {name: entry for name, entry in PUBLISHED.items() if entry["parameters"] is not None}
SMALLEST = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_parameter_count_is_the_published_one(
    name: str, shape_of: Callable[[str], ModelShape]
) -> None:
    published = COUNTED[name]["parameters"]
    assert shape_of(name).parameter_count == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_transformers_own_module_is_counted(
    name: str, shape_of: Callable[[str], ModelShape]
) -> None:
    entry = PUBLISHED[name]
    buffers = entry.get("router_correction_biases", 0)
    assert shape_of(name).parameter_count == entry["transformers_parameters"] + buffers


def test_every_config_here_has_a_source_and_most_a_published_count() -> None:
    assert {path.name for path in (Path(__file__).parent / "configs").iterdir()} == set(PUBLISHED)
    assert all(entry["source"] and entry["parameters_source"] for entry in PUBLISHED.values())
    assert len(COUNTED) >= 40


@pytest.mark.parametrize(
    "name", [name for name, entry in PUBLISHED.items() if "checkpoint_gb" in entry]
)
def test_a_quantised_checkpoint_is_as_large_as_its_files(
    name: str, shape_of: Callable[[str], ModelShape]
) -> None:
    size_gb = checkpoint_bits(shape_of(name)) / 8e9
    assert size_gb == pytest.approx(PUBLISHED[name]["checkpoint_gb"], rel=0.01)


def _windows(shape: ModelShape) -> list[int | None]:
    """Of each layer, in order."""
    caches = [shape.kinds[kind].caches[0] for kind in shape.order]
    return [cache.window_tokens for cache in caches if isinstance(cache, KeysAndValues)]


@pytest.mark.parametrize(
    ("name", "start", "windowed"),
    [
        ("gemma-2-9b", [4096, None, 4096, None], 21),
        ("gemma-3-4b", [1024, 1024, 1024, 1024, 1024, None], 29),
        ("gpt-oss-20b", [128, None, 128, None], 12),
        ("mistral-7b-v0.1", [4096, 4096], 32),
        ("command-r7b", [4096, 4096, 4096, None], 24),
        ("llama-4-scout", [8192, 8192, 8192, None], 36),
        ("qwen3-8b", [None, None], 0),
        ("mistral-7b", [None, None], 0),
    ],
)
def test_layers_see_a_window_where_the_model_says_so(
    name: str, start: list[int | None], windowed: int, shape_of: Callable[[str], ModelShape]
) -> None:
    windows = _windows(shape_of(name))
    assert windows[: len(start)] == start
    assert len(windows) - windows.count(None) == windowed


def test_a_qwen_window_begins_at_some_layer(shape_of: Callable[[str], ModelShape]) -> None:
    config = json.loads((Path(__file__).parent / "configs/qwen2.5-7b/config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 20}
    assert _windows(ModelShape.from_config(config)) == [None] * 20 + [4096] * 8


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("jamba-v0.1", 4), ("qwen3-next-80b-a3b", 2), ("nemotron-h-8b", 3), ("deepseek-v3", 2)],
)
def test_layers_of_one_kind_are_kept_once(
    name: str, kinds: int, shape_of: Callable[[str], ModelShape]
) -> None:
    assert len(shape_of(name).kinds) <= kinds


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
