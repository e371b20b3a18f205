"""A config.json may be written by anybody: one clear error, at once, in little memory."""

import copy
import json
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vram.errors import Invalid, UnknownArchitecture
from vram.estimate import estimate
from vram.gpu import device_named
from vram.hub import read_config
from vram.model import ModelShape
from vram.module_patterns import Modules

CONFIGS = Path(__file__).parent / "configs"
H200 = device_named("H200")
# One of each family, and of each way to be quantised.
FAMILIES = (
    "llama-3.1-8b",
    "gemma-3-4b",
    "gpt-oss-20b",
    "deepseek-v3",
    "qwen3-30b-a3b-fp8",
    "jamba-v0.1",
    "qwen3-next-80b-a3b",
    "nemotron-3-nano-30b",
    "falcon-mamba-7b",
    "mamba-codestral-7b",
    "qwen2.5-vl-7b",
    "qwen3-vl-8b",
    "llama-4-scout",
    "mistral-small-3.1-24b",
    "whisper-small",
    "bge-m3",
    "modernbert-base",
    "falcon-7b",
    "gpt2",
    "llama-3.1-8b-fp8",
    "llama-2-13b-gptq",
    "llama-3.1-8b-bnb-4bit",
    "minimax-m2.5",
    "phi-3.5-moe",
)
HOSTILE: tuple[object, ...] = (
    -1,
    0,
    1,
    7,
    10**12,
    10**4000,
    1.5,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "x" * 10_000,
    [],
    [-1],
    ["x"] * 100_000,
    [1] * 100_000,
    [[]],
    {},
    {"a": {"b": {"c": []}}},
)


def _config(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / name / "config.json").read_text())


def _paths(config: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from _paths(value, (*prefix, key))


def _with(config: dict[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


def _refusal(config: object, settings_with: Any = None) -> str:
    """What is said against it; empty for a config that is possible after all."""
    try:
        shape = ModelShape.from_config(config)  # type: ignore[arg-type]
        if settings_with:
            context_tokens = min(64, shape.max_context_tokens)
            estimate(shape, settings_with(max_model_len=context_tokens), H200)
    except Invalid as error:
        return str(error) or "nothing"
    return ""


@pytest.mark.parametrize("name", FAMILIES)
def test_one_hostile_value_is_a_shape_or_one_clear_error(name: str, settings_with) -> None:
    config = _config(name)
    for path in _paths(config):
        for value in HOSTILE:
            said = _refusal(_with(config, path, value), settings_with)
            assert len(said) < 4000, (path, type(value))
            assert "\n" not in said


@pytest.mark.parametrize("name", FAMILIES)
def test_a_missing_key_is_a_default_of_transformers_or_named(name: str) -> None:
    config = _config(name)
    for path in _paths(config):
        changed = copy.deepcopy(config)
        place = changed
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        said = _refusal(changed)
        # Without a section, what is missing is what stood in it.
        assert not said or path[-1] in said or "has no" in said, path


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(FAMILIES), data=st.data())
def test_several_wild_values_are_a_shape_or_one_clear_error(name: str, data) -> None:
    config = _config(name)
    paths = data.draw(st.lists(st.sampled_from(list(_paths(config))), max_size=4, unique=True))
    for path in sorted(paths, key=len, reverse=True):
        config = _with(config, path, data.draw(values))
    assert _refusal(config) != "nothing"


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 1024},
        {"num_hidden_layers": 1024, "quantization_config": {
            "quant_method": "fp8",
            "modules_to_not_convert": [f"model.layers.{n}.mlp.gate" for n in range(16_000)],
        }},
        {"quantization_config": {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {"weights": {"num_bits": 4}}},
            "ignore": ["re:" + ".*e" * 100] * 300,
        }},
        {"layer_types": ["sliding_attention"] * 32, "sliding_window": 128},
        {"padding": [[0] * 100] * 3000},
    ],
    ids=["layers", "names", "patterns", "windows", "padding"],
)  # fmt: skip
def test_the_largest_possible_config_is_read_in_a_moment_and_in_little_memory(
    change: dict[str, object], tmp_path: Path, settings_with
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_config("llama-3.1-8b") | change))
    tracemalloc.start()
    started_s = time.process_time()  # of this process: the machine may be busy
    try:
        shape = ModelShape.from_config(read_config(str(tmp_path)))
        estimate(shape, settings_with(), H200)
    except Invalid:
        pass
    elapsed_s = time.process_time() - started_s
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert elapsed_s < 5  # 1 s without the tracing of every allocation
    assert peak_bytes < 100 * 2**20


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(.*)*x", "[a-z]+", "a{1,9999}", "((a|b)|c)", "(a|b", "\\", "(a|b)" * 20, "x" * 999],
)
def test_a_pattern_beyond_the_few_that_tools_write_is_refused(pattern: str) -> None:
    with pytest.raises(Invalid, match="not understood"):
        Modules([f"re:{pattern}"])


@pytest.mark.parametrize(
    ("entry", "named", "other"),
    [
        ("lm_head", "lm_head", "model.embed_tokens"),
        ("re:.*lm_head", "lm_head", "lm"),
        ("re:.*mlp\\.gate$", "model.layers.3.mlp.gate", "model.layers.3.mlp.gate_proj"),
        ("re:.*self_attn.*", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"),
        (
            "re:.*mlp\\.(gate|up)_proj.*",
            "model.layers.1.mlp.up_proj",
            "model.layers.1.mlp.down_proj",
        ),
        ("re:model\\.layers\\.\\d+\\.self", "model.layers.12.self_attn.k_proj", "model.norm"),
        ("model.layers.*.self_attn", "model.layers.7.self_attn.o_proj", "model.layers.7.mlp"),
        ("vision_tower*", "vision_tower.blocks.0", "model.vision_tower"),
        ("gate", "model.layers.3.block_sparse_moe.gate", "model.layers.3.gate_proj"),
        ("model.layers.3.mlp", "model.layers.3.mlp.up_proj", "model.layers.30.mlp.up_proj"),
    ],
)
def test_entries_name_modules_as_the_tools_mean_them(entry: str, named: str, other: str) -> None:
    modules = Modules([entry])
    assert modules.names_any([named])
    assert not modules.names_any([other])


def test_an_architecture_that_is_not_known_says_what_is_missing() -> None:
    with pytest.raises(UnknownArchitecture) as caught:
        ModelShape.from_config(_config("gpt2") | {"architectures": ["RecurrentGemmaForCausalLM"]})
    assert "what its layers are made of is not in our table" in str(caught.value)
    assert "LlamaForCausalLM" in str(caught.value)


def test_a_context_above_the_maximum_names_rope_scaling(shape_of, settings_with) -> None:
    with pytest.raises(Invalid, match="rope_scaling") as caught:
        estimate(shape_of("qwen2.5-7b"), settings_with(max_model_len=131072), H200)
    assert caught.value.setting == "max_model_len"


def test_rope_scaling_lengthens_the_context(settings_with) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    shape = ModelShape.from_config(_config("qwen2.5-7b") | {"rope_scaling": yarn})
    assert shape.max_context_tokens == 131072
    assert estimate(shape, settings_with(max_model_len=131072), H200).fits
