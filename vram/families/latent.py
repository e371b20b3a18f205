"""DeepSeek V2 and V3 and what is built like them: Kimi K2, GLM-4.7 Flash."""

from vram.config_reader import ConfigReader
from vram.families.blocks import norms
from vram.families.body import Body, ends, max_context, rope_elements
from vram.families.decoders import assembled
from vram.families.mixers import latent_attention
from vram.families.routed import deepseek as routed
from vram.parts import Layer, joined


def build(read: ConfigReader) -> Body:
    hidden_size, num_layers = read.integer("hidden_size"), read.layers()
    rope_head_dim = read.integer("qk_rope_head_dim")
    vocab_size = read.integer("vocab_size")
    tied = read.flag("tie_word_embeddings", default=False)

    def mixer(window_tokens: int | None) -> Layer:
        return joined(
            latent_attention(
                hidden_size=hidden_size,
                num_heads=read.heads(),
                query_rank=read.integer("q_lora_rank", lowest=0, default=0),
                latent_rank=read.integer("kv_lora_rank"),
                plain_head_dim=read.integer("qk_nope_head_dim"),
                rope_head_dim=rope_head_dim,
                value_head_dim=read.integer("v_head_dim"),
                bias=read.flag("attention_bias", default=False),
            ),
            norms(hidden_size, 2),
        )

    first, last, head = ends(read, hidden_size=hidden_size, vocab_size=vocab_size, tied=tied)
    return Body(
        layers=assembled([None] * num_layers, mixer, read, routed),
        first=first,
        last=last,
        head=head,
        tied=tied,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        max_context_tokens=max_context(read),
        rope_elements=rope_elements(read, rope_head_dim),
        routed=True,
    )
