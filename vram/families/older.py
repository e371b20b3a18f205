"""Decoders from before Llama: plain feed-forward layers, norms with biases, learned positions."""

from dataclasses import dataclass

from vram.config_reader import ConfigReader
from vram.errors import UnknownArchitecture
from vram.families.blocks import attention, mlp, norms
from vram.families.body import Body, ends, max_context
from vram.parts import Tensor, array, joined


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """The numbers of such a model."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    context_tokens: int
    learned_positions: int = 0
    bias: bool = True
    norms_per_layer: int = 2
    embedding_norm: bool = False
    tied: bool = True
    rope_share: float = 0.0
    layer_prefix: str
    embedding_module: str


def gpt2(read: ConfigReader) -> Body:
    size, positions = read.integer("n_embd", "hidden_size"), read.context("n_positions")
    num_heads = read.heads("n_head", "num_attention_heads")
    shares = read.flag("multi_query", default=False)  # StarCoder
    return _body(
        read,
        Plain(
            hidden_size=size,
            num_layers=read.layers("n_layer", "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=1 if shares else num_heads,
            intermediate_size=read.integer("n_inner", default=4 * size),
            context_tokens=positions,
            learned_positions=positions,
            layer_prefix="transformer.h.",
            embedding_module="transformer.wte",
        ),
    )


def opt(read: ConfigReader) -> Body:
    size, positions = read.integer("hidden_size"), read.context()
    if read.integer("word_embed_proj_dim", default=size) != size:
        # Only OPT-350M; its projections and its missing norm are not counted here.
        raise UnknownArchitecture("OPTForCausalLM", "word_embed_proj_dim differs from hidden_size.")
    return _body(
        read,
        Plain(
            hidden_size=size,
            num_layers=read.layers(),
            num_heads=read.heads(),
            num_kv_heads=read.heads(),
            intermediate_size=read.integer("ffn_dim"),
            context_tokens=positions,
            learned_positions=positions + 2,  # the first two are padding
            bias=read.flag("enable_bias", default=True),
            layer_prefix="model.decoder.layers.",
            embedding_module="model.decoder.embed_tokens",
        ),
    )


def gpt_neox(read: ConfigReader) -> Body:
    return _body(
        read,
        Plain(
            hidden_size=read.integer("hidden_size"),
            num_layers=read.layers(),
            num_heads=read.heads(),
            num_kv_heads=read.heads(),
            intermediate_size=read.integer("intermediate_size"),
            context_tokens=max_context(read),
            tied=False,
            rope_share=read.number("rotary_pct", default=0.25),
            layer_prefix="gpt_neox.layers.",
            embedding_module="gpt_neox.embed_in",
        ),
    )


def bloom(read: ConfigReader) -> Body:
    size = read.integer("hidden_size", "n_embed")
    num_heads = read.heads("n_head", "num_attention_heads")
    return _body(
        read,
        Plain(
            hidden_size=size,
            num_layers=read.layers("n_layer", "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_heads,
            intermediate_size=4 * size,
            context_tokens=max_context(read, default=2048),
            embedding_norm=True,
            layer_prefix="transformer.h.",
            embedding_module="transformer.word_embeddings",
        ),
    )


def falcon(read: ConfigReader) -> Body:
    """Multi-query in 7B, grouped queries and two norms in 40B and 180B."""
    size = read.integer("hidden_size")
    num_heads = read.heads("num_attention_heads", "n_head")
    is_new = read.flag("new_decoder_architecture", default=False)
    shares = read.flag("multi_query", default=True)
    kv_heads = read.heads("num_kv_heads", default=num_heads) if is_new else num_heads
    parallel = read.flag("parallel_attn", default=True)
    return _body(
        read,
        Plain(
            hidden_size=size,
            num_layers=read.layers("num_hidden_layers", "n_layer"),
            num_heads=num_heads,
            num_kv_heads=1 if shares and not is_new else kv_heads,
            intermediate_size=read.integer("ffn_hidden_size", default=4 * size),
            context_tokens=max_context(read, default=2048),
            bias=read.flag("bias", default=False),
            norms_per_layer=read.integer("num_ln_in_parallel_attn", default=2)
            if is_new
            else 1 + (not parallel),
            tied=read.flag("tie_word_embeddings", default=True),
            rope_share=0.0 if read.flag("alibi", default=False) else 1.0,
            layer_prefix="transformer.h.",
            embedding_module="transformer.word_embeddings",
        ),
    )


def _body(read: ConfigReader, plain: Plain) -> Body:
    size, vocab_size = plain.hidden_size, read.integer("vocab_size")
    head_dim = max(size // plain.num_heads, 1)
    tied = read.flag("tie_word_embeddings", default=plain.tied)
    layer = joined(
        attention(
            hidden_size=size,
            num_heads=plain.num_heads,
            num_kv_heads=plain.num_kv_heads,
            head_dim=head_dim,
            qkv_bias=plain.bias,
            output_bias=plain.bias,
        ),
        mlp(
            hidden_size=size,
            intermediate_size=plain.intermediate_size,
            gated=False,
            bias=plain.bias,
        ),
        norms(size, plain.norms_per_layer, bias=True),
    )
    first, last, head = ends(
        read,
        hidden_size=size,
        vocab_size=vocab_size,
        tied=tied,
        embedding_module=plain.embedding_module,
        norm_bias=True,
    )
    extra: tuple[Tensor, ...] = ()
    if plain.learned_positions:
        extra += (array("positions", plain.learned_positions, size),)
    if plain.embedding_norm:
        extra += norms(size, 1, bias=True, names=("embedding_norm",)).tensors
    return Body(
        layers=(layer,) * plain.num_layers,
        layer_prefix=plain.layer_prefix,
        first=(*first, *extra),
        last=last,
        head=head,
        tied=tied,
        hidden_size=size,
        vocab_size=vocab_size,
        max_context_tokens=plain.context_tokens,
        rope_elements=int(plain.rope_share * head_dim) * plain.context_tokens,
    )
