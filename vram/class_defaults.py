"""What transformers' classes take for a key that a config.json leaves out, where it is a size.

A missing key is not a missing part: Mistral without `num_key_value_heads` has 8, Llama as many as
heads. Only what differs from the rule of `vram.families` is here. Source: transformers 5.23,
models/*/configuration_*.py; tests/vram/test_vram_class_defaults.py compares.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_SUFFIXES = ("ForCausalLM", "ForSequenceClassification", "ForConditionalGeneration", "Model")

# By the architecture without what it is used for.
CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "DeepseekV2": {"q_lora_rank": 1536, "n_routed_experts": 64, "n_shared_experts": 2},
        "DeepseekV3": {
            "q_lora_rank": 1536,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "first_k_dense_replace": 3,
        },
        "Bamba": {"num_key_value_heads": 8},
        "Ernie4_5": {"num_key_value_heads": 2},
        "Ernie4_5_Moe": {"num_key_value_heads": 4},
        "Gemma": {"num_key_value_heads": 16},
        "Gemma2": {"num_key_value_heads": 4},
        "Glm": {"num_key_value_heads": 2, "attention_bias": True},
        "Glm4": {"num_key_value_heads": 2, "attention_bias": True},
        "Glm4Moe": {"num_key_value_heads": 8},
        "GPTBigCode": {"multi_query": True},
        "GptOss": {"num_key_value_heads": 8, "attention_bias": True},
        "Jamba": {"num_key_value_heads": 8},
        "Llama4": {"num_key_value_heads": 8},
        "Mamba2": {"tie_word_embeddings": False},
        "MiniMaxM2": {"num_key_value_heads": 8, "head_dim": 128},
        "Mistral": {"num_key_value_heads": 8},
        "Mixtral": {"num_key_value_heads": 8},
        "NemotronH": {"num_key_value_heads": 8, "head_dim": 128},
        "PhiMoE": {"num_key_value_heads": 8},
        "Qwen2": {"num_key_value_heads": 32},
        "Qwen2Moe": {"num_key_value_heads": 16, "shared_expert_intermediate_size": 5632},
        "Qwen2VL": {"num_key_value_heads": 8},
        "Qwen2_5_VL": {"num_key_value_heads": 8},
        "Qwen3VL": {"num_key_value_heads": 32, "head_dim": 128},
        "Qwen3VLMoe": {"num_key_value_heads": 16, "head_dim": 128},
        "Qwen3_5": {"num_key_value_heads": 4, "head_dim": 256},
        "Qwen3_5Moe": {
            "num_key_value_heads": 2,
            "head_dim": 256,
            "shared_expert_intermediate_size": 512,
        },
        "Qwen3": {"num_key_value_heads": 32, "head_dim": 128},
        "Qwen3Moe": {"num_key_value_heads": 4},
        "Qwen3Next": {
            "num_key_value_heads": 2,
            "head_dim": 256,
            "shared_expert_intermediate_size": 512,
        },
        "SmolLM3": {"num_key_value_heads": 4},
        "Starcoder2": {"num_key_value_heads": 2, "use_bias": True},
    }
)


def class_defaults(architecture: str) -> Mapping[str, Any]:
    """Of the class that `architectures` names; nothing for one that the families know alone."""
    for suffix in _SUFFIXES:
        if architecture.endswith(suffix):
            return CLASS_DEFAULTS.get(architecture.removesuffix(suffix), {})
    return CLASS_DEFAULTS.get(architecture, {})
