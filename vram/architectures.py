"""What each architecture's layers are made of, where config.json alone does not say it.

Only what was read from the model's code is here. An architecture that is not in the table is an
error: a guess would place a model on a card that it does not fit.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How one family builds its layers. None for a bias: config.json says it, absent is no."""

    gated_mlp: bool = True
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    norms_per_layer: int = 2
    tied_embeddings: bool = False
    head_dim: int | None = None
    experts: Literal["none", "mixtral", "qwen"] = "none"
    # Which layers see only a window of the context, when layer_types is not in config.json.
    windows: Literal["none", "all", "alternate", "one_in_pattern_is_full", "qwen"] = "none"


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(),
    "MistralForCausalLM": Architecture(
        qkv_bias=False, output_bias=False, mlp_bias=False, windows="all"
    ),
    "MixtralForCausalLM": Architecture(
        qkv_bias=False, output_bias=False, mlp_bias=False, windows="all", experts="mixtral"
    ),
    "Qwen2ForCausalLM": Architecture(
        qkv_bias=True, output_bias=False, mlp_bias=False, windows="qwen"
    ),
    "Qwen2MoeForCausalLM": Architecture(
        qkv_bias=True, output_bias=False, mlp_bias=False, windows="qwen", experts="qwen"
    ),
    "Qwen3ForCausalLM": Architecture(mlp_bias=False, qk_norm=True, windows="qwen"),
    "Qwen3MoeForCausalLM": Architecture(
        mlp_bias=False, qk_norm=True, windows="qwen", experts="qwen"
    ),
    "GemmaForCausalLM": Architecture(mlp_bias=False, tied_embeddings=True, head_dim=256),
    "Gemma2ForCausalLM": Architecture(
        mlp_bias=False, tied_embeddings=True, head_dim=256, norms_per_layer=4, windows="alternate"
    ),
    "Gemma3ForCausalLM": Architecture(
        mlp_bias=False,
        tied_embeddings=True,
        head_dim=256,
        qk_norm=True,
        norms_per_layer=4,
        windows="one_in_pattern_is_full",
    ),
    "Phi3ForCausalLM": Architecture(
        qkv_bias=False, output_bias=False, mlp_bias=False, windows="all"
    ),
}
