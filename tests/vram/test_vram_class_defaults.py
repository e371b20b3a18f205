"""Keys that a config.json leaves out: what the model's class takes for them, or a refusal."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from vram.class_defaults import CLASS_DEFAULTS, class_defaults
from vram.errors import Invalid
from vram.model import ModelShape

CONFIGS = Path(__file__).parent / "configs"
# transformers' names of the same models.
MODEL_TYPES = {
    "Ernie4_5_Moe": "ernie4_5_moe",
    "Glm4Moe": "glm4_moe",
    "GPTBigCode": "gpt_bigcode",
    "GptOss": "gpt_oss",
    "DeepseekV2": "deepseek_v2",
    "DeepseekV3": "deepseek_v3",
    "MiniMaxM2": "minimax_m2",
    "NemotronH": "nemotron_h",
    "Qwen2Moe": "qwen2_moe",
    "Qwen2VL": "qwen2_vl",
    "Qwen2_5_VL": "qwen2_5_vl",
    "Qwen3Moe": "qwen3_moe",
    "Qwen3Next": "qwen3_next",
    "Qwen3VL": "qwen3_vl",
    "Qwen3VLMoe": "qwen3_vl_moe",
    "Qwen3_5Moe": "qwen3_5_moe",
}


@pytest.mark.parametrize("name", CLASS_DEFAULTS)
def test_the_defaults_are_those_of_the_class(name: str) -> None:
    config = AutoConfig.for_model(MODEL_TYPES.get(name, name.lower()))
    known = getattr(config, "text_config", config).to_dict()
    assert {key: known[key] for key in CLASS_DEFAULTS[name]} == CLASS_DEFAULTS[name]


def without(model: str, key: str) -> ModelShape:
    config: dict[str, Any] = json.loads((CONFIGS / model / "config.json").read_text())
    del config[key]
    return ModelShape.from_config(config)


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("mistral-7b", "num_key_value_heads"),
        ("mixtral-8x7b", "num_key_value_heads"),
        ("gpt-oss-20b", "attention_bias"),
        ("glm-4-9b", "num_key_value_heads"),
        ("deepseek-v3", "n_routed_experts"),
        ("deepseek-v3", "first_k_dense_replace"),
        ("deepseek-v2", "q_lora_rank"),
        ("jamba-v0.1", "num_key_value_heads"),
        ("qwen3-32b", "head_dim"),
        ("qwen3-next-80b-a3b", "shared_expert_intermediate_size"),
        ("starcoder-15b", "multi_query"),
        ("mamba-codestral-7b", "tie_word_embeddings"),
    ],
)
def test_a_key_that_has_the_class_s_value_may_be_left_out(model: str, key: str) -> None:
    config = json.loads((CONFIGS / model / "config.json").read_text())
    whole = ModelShape.from_config(config)
    assert without(model, key).parameter_count == whole.parameter_count
    assert without(model, key).num_kv_heads == whole.num_kv_heads


@pytest.mark.parametrize(
    ("model", "section", "key"),
    [
        ("llama-4-scout", "text_config", "num_key_value_heads"),
        ("qwen3.5-27b", "text_config", "head_dim"),
        ("qwen3.5-27b", "vision_config", "hidden_size"),
        ("qwen3-vl-8b", "vision_config", "deepstack_visual_indexes"),
        ("qwen3-vl-8b", "vision_config", "patch_size"),
        ("qwen2-vl-7b", "vision_config", "embed_dim"),
        ("qwen2.5-vl-7b", "vision_config", "out_hidden_size"),
    ],
)
def test_a_key_of_a_part_may_be_left_out_too(model: str, section: str, key: str) -> None:
    config = json.loads((CONFIGS / model / "config.json").read_text())
    whole = ModelShape.from_config(config).parameter_count
    del config[section][key]
    assert ModelShape.from_config(config).parameter_count == whole


@pytest.mark.parametrize("model", ["qwen2.5-7b", "gemma-2b"])
def test_a_default_that_does_not_fit_the_other_sizes_is_refused(model: str) -> None:
    with pytest.raises(Invalid, match="key-value heads"):
        without(model, "num_key_value_heads")


def test_a_key_that_says_null_has_no_default() -> None:
    config = json.loads((CONFIGS / "deepseek-v2-lite/config.json").read_text())
    assert config["q_lora_rank"] is None
    assert ModelShape.from_config(config).parameter_count == pytest.approx(15.7e9, rel=0.005)


def test_every_use_of_a_model_has_its_defaults() -> None:
    uses = ("MistralForCausalLM", "MistralModel", "MistralForSequenceClassification")
    assert {class_defaults(use)["num_key_value_heads"] for use in uses} == {8}
    assert class_defaults("LlamaForCausalLM") == {}
