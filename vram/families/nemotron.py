"""NVIDIA's Nemotron-H and Nemotron 3: state spaces, a little attention, dense or routed layers."""

from collections.abc import Callable

from vram.config_reader import MOST_EXPERTS, MOST_LAYERS, ConfigReader
from vram.errors import Invalid
from vram.families.blocks import experts, linear, mlp
from vram.families.body import Body
from vram.families.hybrids import FLOAT32, assembled, plain_attention
from vram.families.mixers import mamba2
from vram.parts import Layer, joined, whole


def build(read: ConfigReader) -> Body:
    """Each layer is one thing: a mixer (M), attention (*), feed-forward (-) or experts (E)."""
    hidden_size = read.integer("hidden_size")
    bias = read.flag("mlp_bias", default=False)
    pattern = read.text("hybrid_override_pattern", default="") or _pattern(read)
    if not 0 < len(pattern) <= MOST_LAYERS:
        raise Invalid(
            f"config.json: hybrid_override_pattern has {len(pattern)} layers",
            "hybrid_override_pattern",
        )

    makers: dict[str, Callable[[], Layer]] = {
        "M": lambda: mamba2(
            hidden_size=hidden_size,
            num_heads=read.heads("mamba_num_heads"),
            head_dim=read.integer("mamba_head_dim"),
            num_groups=read.heads("n_groups"),
            state_size=read.integer("ssm_state_size"),
            convolution_tokens=read.integer("conv_kernel", default=4),
            bias=read.flag("use_bias", default=False),
            convolution_bias=read.flag("use_conv_bias", default=True),
            state_is_float32=read.text("mamba_ssm_cache_dtype", default=FLOAT32) == FLOAT32,
        ),
        "*": lambda: plain_attention(read, prefix="mixer.", head_dim_keys=("attention_head_dim",)),
        "-": lambda: mlp(
            hidden_size=hidden_size,
            intermediate_size=read.integer("intermediate_size"),
            prefix="mixer.",
            gated=False,
            bias=bias,
        ),
        "E": lambda: _experts(read, hidden_size, bias=bias),
    }
    unknown = set(pattern) - set(makers)
    if unknown:
        raise Invalid(
            f"config.json: hybrid_override_pattern has layers of kind {sorted(unknown)[0]!r}; "
            f"known are {' '.join(makers)}",
            "hybrid_override_pattern",
        )
    kinds = {kind: makers[kind]() for kind in dict.fromkeys(pattern)}
    return assembled(
        read,
        [(kinds[kind],) for kind in pattern],
        norms_per_layer=1,
        has_rope=False,
        layer_prefix="backbone.layers.",
        embedding_module="backbone.embeddings",
        routed_layers="E" in pattern,
    )


def _experts(read: ConfigReader, hidden_size: int, *, bias: bool) -> Layer:
    latent_size = read.integer("moe_latent_size", lowest=0, default=0)
    parts = [
        experts(
            hidden_size=hidden_size,
            intermediate_size=read.integer("moe_intermediate_size"),
            num_experts=read.integer("n_routed_experts", highest=MOST_EXPERTS),
            experts_per_token=read.integer("num_experts_per_tok", highest=MOST_EXPERTS),
            prefix="mixer.",
            correction_bias=True,
            gated=False,
            input_size=latent_size,
        ),
        mlp(
            hidden_size=hidden_size,
            intermediate_size=read.integer("moe_shared_expert_intermediate_size"),
            prefix="mixer.shared_experts.",
            gated=False,
            bias=bias,
        ),
    ]
    if latent_size:
        there = linear("mixer.fc1_latent_proj", whole(latent_size), whole(hidden_size))
        back = linear("mixer.fc2_latent_proj", whole(hidden_size), whole(latent_size))
        parts += [there, back]
    return joined(*parts)


def _pattern(read: ConfigReader) -> str:
    """transformers 5 writes words for the letters."""
    letters = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*"}
    letters |= {"mlp": "-", "moe": "E"}
    words = read.texts("layers_block_type") or read.texts("layer_types")
    return "".join(letters.get(word, "?") for word in words)
