"""Models without attention: Mamba, Mamba 2, Falcon Mamba."""

from vram.config_reader import ConfigReader
from vram.families.blocks import norms
from vram.families.body import Body, ends, max_context
from vram.families.mixers import mamba, mamba2
from vram.parts import Layer, joined

# A state is as large after a million tokens as after one; this only bounds the arithmetic.
NO_LIMIT_TOKENS = 1 << 20


def mamba_1(read: ConfigReader) -> Body:
    hidden_size = read.integer("hidden_size", "d_model")
    inner_size = read.integer(
        "intermediate_size", default=read.integer("expand", default=2) * hidden_size
    )
    mixer = mamba(
        hidden_size=hidden_size,
        inner_size=inner_size,
        state_size=read.integer("state_size", default=16),
        step_rank=step_rank(read, "time_step_rank", hidden_size),
        convolution_tokens=read.integer("conv_kernel", default=4),
        bias=read.flag("use_bias", default=False),
        convolution_bias=read.flag("use_conv_bias", default=True),
        step_norms=False,
        prefix="mixer.",
    )
    return _body(read, hidden_size, mixer)


def step_rank(read: ConfigReader, key: str, hidden_size: int) -> int:
    """Of Mamba 1: a sixteenth of the width where `key` is missing or says "auto"."""
    rank = -(-hidden_size // 16)
    return rank if read.is_text(key) else read.integer(key, default=rank)


def mamba_2(read: ConfigReader) -> Body:
    hidden_size = read.integer("hidden_size")
    mixer = mamba2(
        hidden_size=hidden_size,
        num_heads=read.heads("num_heads"),
        head_dim=read.integer("head_dim"),
        num_groups=read.heads("n_groups"),
        state_size=read.integer("state_size"),
        convolution_tokens=read.integer("conv_kernel", default=4),
        bias=read.flag("use_bias", default=False),
        convolution_bias=read.flag("use_conv_bias", default=True),
    )
    return _body(read, hidden_size, mixer)


def _body(read: ConfigReader, hidden_size: int, mixer: Layer) -> Body:
    vocab_size = read.integer("vocab_size")
    tied = read.flag("tie_word_embeddings", default=True)
    layer = joined(norms(hidden_size, 1), mixer)
    first, last, head = ends(
        read,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        tied=tied,
        embedding_module="backbone.embeddings",
        norm_module="backbone.norm_f",
    )
    return Body(
        layers=(layer,) * read.layers("num_hidden_layers", "n_layer"),
        layer_prefix="backbone.layers.",
        first=first,
        last=last,
        head=head,
        tied=tied,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        max_context_tokens=max_context(read, default=NO_LIMIT_TOKENS),
    )
