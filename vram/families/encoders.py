"""Encoders that embed, rank or classify, and the encoder-decoder Whisper."""

from collections.abc import Callable
from dataclasses import replace

from vram.config_reader import ConfigReader
from vram.families.blocks import attention, embedding, linear, mlp, norms
from vram.families.body import Body, max_context
from vram.families.decoders import Decoder, build
from vram.parts import (
    CrossKeysAndValues,
    Layer,
    Tensor,
    array,
    joined,
    prefixed,
    vector,
    whole,
)


def bert(*, position_offset: int = 0, head: str = "pooler") -> Callable[[ConfigReader], Body]:
    """BERT, and RoBERTa, whose first positions are padding."""

    def read_body(read: ConfigReader) -> Body:
        size, num_heads = read.integer("hidden_size"), read.heads()
        positions = read.context()
        layer = joined(
            attention(
                hidden_size=size,
                num_heads=num_heads,
                num_kv_heads=num_heads,
                head_dim=max(size // num_heads, 1),
                prefix="attention.",
                qkv_bias=True,
                output_bias=True,
                cached=False,
            ),
            mlp(
                hidden_size=size,
                intermediate_size=read.integer("intermediate_size"),
                prefix="",
                gated=False,
                bias=True,
                modules=("intermediate.dense", "output.dense"),
            ),
            norms(size, 2, bias=True),
        )
        first = (
            embedding("embeddings.word_embeddings", read.integer("vocab_size"), size),
            array("embeddings.position_embeddings", positions, size),
            array(
                "embeddings.token_type_embeddings", read.integer("type_vocab_size", default=2), size
            ),
            *norms(size, 1, bias=True, names=("embeddings.LayerNorm",)).tensors,
        )
        return Body(
            layers=(layer,) * read.layers(),
            layer_prefix="encoder.layer.",
            first=first,
            last=_heads(read, size)[head],
            tied=True,
            hidden_size=size,
            vocab_size=read.integer("vocab_size"),
            max_context_tokens=max(positions - position_offset, 1),
            generates=False,
        )

    return read_body


def modern_bert(read: ConfigReader) -> Body:
    """ModernBERT: rotary positions, gated feed-forward layers, windows in two of three layers."""
    size, num_heads = read.integer("hidden_size"), read.heads()
    attending = attention(
        hidden_size=size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=max(size // num_heads, 1),
        prefix="attn.",
        qkv_bias=read.flag("attention_bias", default=False),
        output_bias=read.flag("attention_bias", default=False),
        cached=False,
    )
    feed_forward = mlp(
        hidden_size=size,
        intermediate_size=read.integer("intermediate_size"),
        bias=read.flag("mlp_bias", default=False),
        modules=("Wi", "Wo"),
    )
    bias = read.flag("norm_bias", default=False)
    first_layer = joined(attending, feed_forward, norms(size, 1, bias=bias))
    layer = joined(attending, feed_forward, norms(size, 2, bias=bias))
    return Body(
        layers=(first_layer, *(layer,) * (read.layers() - 1)),
        layer_prefix="layers.",
        first=(
            embedding("embeddings.tok_embeddings", read.integer("vocab_size"), size),
            *norms(size, 1, bias=bias, names=("embeddings.norm",)).tensors,
        ),
        last=norms(size, 1, bias=bias, names=("final_norm",)).tensors,
        tied=True,
        hidden_size=size,
        vocab_size=read.integer("vocab_size"),
        max_context_tokens=max_context(read),
        generates=False,
    )


def without_head(decoder: Decoder) -> Callable[[ConfigReader], Body]:
    """A decoder whose last hidden state is the answer."""
    return _pooling(decoder, classifies=False)


def classifier(decoder: Decoder) -> Callable[[ConfigReader], Body]:
    """A decoder with a small linear layer in the place of its head: rerankers, reward models."""
    return _pooling(decoder, classifies=True)


def whisper(read: ConfigReader) -> Body:
    """Speech: an encoder of 1500 positions, a decoder that attends to them."""
    size = read.integer("d_model")
    positions = read.context("max_source_positions", default=1500)
    vocab_size = read.integer("vocab_size")
    num_heads = read.heads("decoder_attention_heads")
    head_dim = max(size // num_heads, 1)

    def attending(num_heads: int, prefix: str, *, cached: bool) -> Layer:
        return attention(
            hidden_size=size,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=max(size // num_heads, 1),
            prefix=prefix,
            qkv_bias=True,
            key_bias=False,
            output_bias=True,
            cached=cached,
        )

    def feed_forward(key: str) -> Layer:
        return mlp(
            hidden_size=size,
            intermediate_size=read.integer(key),
            prefix="",
            gated=False,
            bias=True,
            modules=("fc1", "fc2"),
        )

    cross = Layer(
        caches=(
            CrossKeysAndValues(num_heads=num_heads, head_dim=head_dim, encoder_tokens=positions),
        )
    )
    layer = joined(
        attending(num_heads, "self_attn.", cached=True),
        attending(num_heads, "encoder_attn.", cached=False),
        cross,
        feed_forward("decoder_ffn_dim"),
        norms(size, 3, bias=True),
    )
    encoder_layer = joined(
        attending(read.heads("encoder_attention_heads"), "self_attn.", cached=False),
        feed_forward("encoder_ffn_dim"),
        norms(size, 2, bias=True),
    )
    encoder = joined(
        *(
            prefixed(encoder_layer, f"layers.{index}.")
            for index in range(read.layers("encoder_layers"))
        ),
        Layer(
            tensors=(
                array("conv1", size, read.integer("num_mel_bins", default=80), 3),
                array("conv2", size, size, 3),
                vector("conv.bias", whole(size), whole(size)),
                array("embed_positions", positions, size),
            )
        ),
        norms(size, 1, bias=True, names=("layer_norm",)),
    )
    context_tokens = read.context("max_target_positions", default=448)
    return Body(
        layers=(layer,) * read.layers("decoder_layers"),
        layer_prefix="model.decoder.layers.",
        first=(
            *prefixed(encoder, "model.encoder.").tensors,
            embedding("model.decoder.embed_tokens", vocab_size, size),
            array("model.decoder.embed_positions", context_tokens, size),
        ),
        last=norms(size, 1, bias=True, names=("model.decoder.layer_norm",)).tensors,
        tied=True,
        hidden_size=size,
        vocab_size=vocab_size,
        max_context_tokens=context_tokens,
    )


def _pooling(decoder: Decoder, *, classifies: bool) -> Callable[[ConfigReader], Body]:
    def read_body(read: ConfigReader) -> Body:
        body = build(decoder, read)
        score: tuple[Tensor, ...] = ()
        if classifies:
            labels = read.integer("num_labels", default=max(read.length("id2label"), 1))
            score = linear("score", whole(labels), whole(body.hidden_size), kind="plain").tensors
        return replace(body, head=None, tied=True, last=(*body.last, *score), generates=False)

    return read_body


def _heads(read: ConfigReader, size: int) -> dict[str, tuple[Tensor, ...]]:
    labels = read.integer("num_labels", default=max(read.length("id2label"), 1))
    dense = linear("pooler.dense", whole(size), whole(size), bias=True, kind="plain").tensors
    score = linear("classifier", whole(labels), whole(size), bias=True, kind="plain").tensors
    return {"pooler": dense, "classifier": (*dense, *score), "none": ()}
