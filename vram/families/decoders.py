"""Decoders whose every layer is attention and a feed-forward layer, dense or routed."""

from collections.abc import Callable
from dataclasses import dataclass

from vram.config_reader import ConfigReader
from vram.errors import Invalid
from vram.families.blocks import QKNorm, attention, mlp, norms
from vram.families.body import Body, ends, max_context, rope_elements
from vram.families.windows import (
    Windows,
    all_but_every,
    alternating,
    by_layer_types,
    everywhere,
    from_some_layer,
    nowhere,
)
from vram.parts import Layer, joined

# (config, layer) -> that layer's feed-forward part.
FeedForward = Callable[[ConfigReader, int], Layer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """How one family builds its layers. A bias is there, is not, or is what a key says."""

    qkv_bias: bool | str = "attention_bias"
    output_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    head_bias: bool | str = False
    gated: bool = True
    qk_norm: QKNorm = "none"
    qk_norm_key: str | None = None
    sinks: bool = False
    norms_per_layer: int = 2
    norm_bias: bool = False
    tied: bool = False  # where config.json does not say
    head_dim: int | None = None  # where config.json does not say
    windows: Windows = nowhere
    feed_forward: FeedForward | None = None
    routed: bool = False
    context_is_scaled: bool = True
    rope_tables: int = 1


def build(decoder: Decoder, read: ConfigReader) -> Body:
    """The whole decoder."""
    hidden_size, num_layers = read.integer("hidden_size"), read.layers()
    num_heads, num_kv_heads, head_dim = head_counts(read, decoder.head_dim)
    vocab_size = read.integer("vocab_size")
    tied = read.flag("tie_word_embeddings", default=decoder.tied)
    feed_forward = decoder.feed_forward or dense(decoder)
    normed = decoder.qk_norm_key is None or read.flag(decoder.qk_norm_key, default=False)
    qk_norm: QKNorm = decoder.qk_norm if normed else "none"

    def mixer(window_tokens: int | None) -> Layer:
        return joined(
            attention(
                hidden_size=hidden_size,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                qkv_bias=is_set(decoder.qkv_bias, read),
                output_bias=is_set(decoder.output_bias, read),
                qk_norm=qk_norm,
                sinks=decoder.sinks,
                window_tokens=window_tokens,
            ),
            norms(hidden_size, decoder.norms_per_layer, bias=decoder.norm_bias),
        )

    first, last, head = ends(
        read,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        tied=tied,
        norm_bias=decoder.norm_bias,
        head_bias=is_set(decoder.head_bias, read),
    )
    return Body(
        layers=assembled(decoder.windows(read, num_layers), mixer, read, feed_forward),
        first=first,
        last=last,
        head=head,
        tied=tied,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        max_context_tokens=max_context(read, scaled=decoder.context_is_scaled),
        rope_elements=rope_elements(read, head_dim, tables=decoder.rope_tables),
        routed=decoder.routed,
    )


def assembled(
    layer_windows: list[int | None],
    mixer: Callable[[int | None], Layer],
    read: ConfigReader,
    feed_forward: FeedForward,
) -> tuple[Layer, ...]:
    """Layers in order; equal ones are one object, so that a thousand cost no more than a few."""
    mixers = {window: mixer(window) for window in dict.fromkeys(layer_windows)}
    known: dict[Layer, Layer] = {}
    layers = []
    for index, window in enumerate(layer_windows):
        layer = joined(mixers[window], feed_forward(read, index))
        layers.append(known.setdefault(layer, layer))
    return tuple(layers)


def dense(decoder: Decoder) -> FeedForward:
    """The same feed-forward layer everywhere."""

    def feed_forward(read: ConfigReader, layer: int) -> Layer:
        return mlp(
            hidden_size=read.integer("hidden_size"),
            intermediate_size=read.integer("intermediate_size"),
            gated=decoder.gated,
            bias=is_set(decoder.mlp_bias, read),
        )

    return feed_forward


def head_counts(read: ConfigReader, default_head_dim: int | None = None) -> tuple[int, int, int]:
    """Attention heads, key-value heads, and the size of one."""
    hidden_size = read.integer("hidden_size")
    num_heads = read.heads()
    num_kv_heads = read.heads("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise Invalid(
            f"config.json: {num_heads} attention heads do not divide "
            f"into {num_kv_heads} key-value heads (num_key_value_heads)",
            "num_key_value_heads",
        )
    head_dim = read.integer(
        "head_dim", default=default_head_dim or max(hidden_size // num_heads, 1), highest=1 << 14
    )
    return num_heads, num_kv_heads, head_dim


def is_set(bias: bool | str, read: ConfigReader) -> bool:
    return read.flag(bias, default=False) if isinstance(bias, str) else bias


LLAMA = Decoder()
MISTRAL = Decoder(qkv_bias=False, output_bias=False, mlp_bias=False, windows=everywhere)
QWEN2 = Decoder(qkv_bias=True, output_bias=False, mlp_bias=False, windows=from_some_layer)
QWEN3 = Decoder(mlp_bias=False, qk_norm="head", windows=from_some_layer)
GEMMA = Decoder(mlp_bias=False, tied=True, head_dim=256)
GEMMA2 = Decoder(mlp_bias=False, tied=True, head_dim=256, norms_per_layer=4, windows=alternating)
GEMMA3 = Decoder(
    mlp_bias=False,
    tied=True,
    head_dim=256,
    qk_norm="head",
    norms_per_layer=4,
    windows=all_but_every("sliding_window_pattern", 6),
    context_is_scaled=False,
    rope_tables=2,
)

DENSE: dict[str, Decoder] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "MinistralForCausalLM": MISTRAL,
    "Ministral3ForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "GemmaForCausalLM": GEMMA,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Phi3ForCausalLM": MISTRAL,
    "GraniteForCausalLM": LLAMA,
    "SmolLM3ForCausalLM": Decoder(tied=True),
    "Olmo2ForCausalLM": Decoder(mlp_bias=False, qk_norm="all_heads"),
    "Olmo3ForCausalLM": Decoder(
        mlp_bias=False,
        qk_norm="all_heads",
        windows=all_but_every("sliding_window_pattern", 4),
    ),
    "Exaone4ForCausalLM": Decoder(
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm="head",
        windows=by_layer_types,
    ),
    "CohereForCausalLM": Decoder(mlp_bias=False, norms_per_layer=1, tied=True),
    "Cohere2ForCausalLM": Decoder(
        mlp_bias=False,
        norms_per_layer=1,
        tied=True,
        windows=all_but_every("sliding_window_pattern", 4),
    ),
    "Glm4ForCausalLM": Decoder(output_bias=False, mlp_bias=False, norms_per_layer=4),
    "GlmForCausalLM": Decoder(output_bias=False, mlp_bias=False),
    "SeedOssForCausalLM": Decoder(output_bias="attention_out_bias"),
    "StableLmForCausalLM": Decoder(
        qkv_bias="use_qkv_bias", output_bias=False, mlp_bias=False, norm_bias=True
    ),
    "Starcoder2ForCausalLM": Decoder(
        qkv_bias="use_bias",
        output_bias="use_bias",
        mlp_bias="use_bias",
        gated=False,
        norm_bias=True,
        tied=True,
        windows=everywhere,
    ),
    "NemotronForCausalLM": Decoder(gated=False, norm_bias=True),
    "PhiForCausalLM": Decoder(
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
        gated=False,
        norms_per_layer=1,
        norm_bias=True,
    ),
    "Ernie4_5ForCausalLM": Decoder(
        qkv_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias", tied=True
    ),
    "ArceeForCausalLM": Decoder(gated=False),
}
