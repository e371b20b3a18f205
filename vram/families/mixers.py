"""What some models have in the place of plain attention: latent attention and state spaces."""

from vram.families.blocks import linear
from vram.parts import (
    Latent,
    Layer,
    Part,
    State,
    Tensor,
    Unpacking,
    Width,
    even,
    heads,
    joined,
    vector,
    whole,
)


def latent_attention(
    *,
    hidden_size: int,
    num_heads: int,
    query_rank: int,  # 0: queries are not compressed
    latent_rank: int,
    plain_head_dim: int,
    rope_head_dim: int,
    value_head_dim: int,
    bias: bool = False,
    prefix: str = "self_attn.",
) -> Layer:
    """DeepSeek's multi-head latent attention as vLLM holds it, with its absorbed matrices."""
    query = heads(num_heads, plain_head_dim + rope_head_dim)
    cached = latent_rank + rope_head_dim
    if query_rank:
        down = Tensor(
            kind="linear",
            modules=(f"{prefix}q_a_proj", f"{prefix}kv_a_proj_with_mqa"),
            rows=(whole(query_rank), whole(cached)),
            columns=whole(hidden_size),
        )
        queries = [down, vector(f"{prefix}q_a_layernorm", whole(query_rank))]
        queries += linear(f"{prefix}q_b_proj", query, whole(query_rank)).tensors
        if bias:
            queries.append(vector(f"{prefix}a_bias", whole(query_rank), whole(cached)))
    else:
        queries = [
            *linear(f"{prefix}q_proj", query, whole(hidden_size)).tensors,
            *linear(
                f"{prefix}kv_a_proj_with_mqa", whole(cached), whole(hidden_size), bias=bias
            ).tensors,
        ]
    up = heads(num_heads, plain_head_dim + value_head_dim)
    value = heads(num_heads, value_head_dim)
    rest = joined(
        linear(f"{prefix}kv_b_proj", up, whole(latent_rank)),
        linear(f"{prefix}o_proj", whole(hidden_size), value),
    )
    norm = vector(f"{prefix}kv_a_layernorm", whole(latent_rank))
    # vLLM keeps kv_b_proj a second time, unpacked, for decoding (mla_attention.py: W_UK_T, W_UV).
    absorbed = Tensor(
        kind="plain",
        modules=(f"{prefix}absorbed",),
        rows=(up,),
        columns=whole(latent_rank),
        in_checkpoint=False,
    )
    output_bias = (vector(f"{prefix}o_bias", whole(hidden_size)),) if bias else ()
    return Layer(
        tensors=(*queries, norm, *rest.tensors, *output_bias, absorbed),
        caches=(Latent(size=cached, value_size=latent_rank, query_heads=num_heads),),
        divisors=(("attention heads", num_heads),),
        query_rows=query.size + value.size,
        unpacking=Unpacking(rows=up, beside=Width(split=(query,), whole=query_rank + cached)),
    )


def mamba(
    *,
    hidden_size: int,
    inner_size: int,
    state_size: int,
    step_rank: int,
    convolution_tokens: int,
    bias: bool,
    convolution_bias: bool,
    step_norms: bool,  # Jamba norms step, B and C
    prefix: str = "mamba.",
) -> Layer:
    """The first Mamba's mixer."""
    inner = even(inner_size)
    tensors = [
        *linear(
            f"{prefix}in_proj", Part(size=2 * inner_size, units=inner_size), whole(hidden_size)
        ).tensors,
        _convolution(f"{prefix}conv1d", (inner,), convolution_tokens),
        *linear(f"{prefix}x_proj", whole(step_rank + 2 * state_size), inner).tensors,
        *linear(f"{prefix}dt_proj", inner, whole(step_rank), bias=True).tensors,
        Tensor(
            kind="plain",
            modules=(f"{prefix}A_log",),
            rows=(inner,),
            columns=whole(state_size),
            is_float32=True,
        ),
        vector(f"{prefix}D", inner, is_float32=True),
        *linear(f"{prefix}out_proj", whole(hidden_size), inner).tensors,
    ]
    if convolution_bias:
        tensors.append(vector(f"{prefix}conv1d.bias", inner))
    if bias:
        tensors.append(vector(f"{prefix}bias", inner, inner, whole(hidden_size)))
    if step_norms:
        tensors.append(vector(f"{prefix}norms", whole(step_rank + 2 * state_size)))
    return Layer(
        tensors=tuple(tensors),
        caches=(
            State(
                convolution=(inner,),
                convolution_tokens=convolution_tokens - 1,
                recurrent=Part(size=inner_size * state_size, units=inner_size),
            ),
        ),
        # both halves of the projection, the convolved input, the step and the output
        widths=(Width(split=(inner,) * 5, whole=step_rank + 2 * state_size),),
        divisors=(("state-space channels", inner_size),),
    )


def mamba2(
    *,
    hidden_size: int,
    num_heads: int,
    head_dim: int,
    num_groups: int,
    state_size: int,
    convolution_tokens: int,
    bias: bool,
    convolution_bias: bool,
    gated_norm: bool = True,
    state_is_float32: bool = False,
    prefix: str = "mixer.",
) -> Layer:
    """The second Mamba's mixer: heads share their B and C in groups."""
    inner, head = heads(num_heads, head_dim), even(num_heads)
    group = heads(num_groups, state_size)
    convolved = (inner, group, group)
    projected = (inner, *convolved, head)
    tensors = [
        Tensor(
            kind="linear",
            modules=(f"{prefix}in_proj",),
            rows=projected,
            columns=whole(hidden_size),
        ),
        _convolution(f"{prefix}conv1d", convolved, convolution_tokens),
        *(vector(f"{prefix}{name}", head, is_float32=True) for name in ("A_log", "D", "dt_bias")),
        *linear(f"{prefix}out_proj", whole(hidden_size), inner).tensors,
    ]
    if convolution_bias:
        tensors.append(vector(f"{prefix}conv1d.bias", *convolved))
    if bias:
        tensors.append(vector(f"{prefix}bias", *projected, whole(hidden_size)))
    if gated_norm:
        tensors.append(vector(f"{prefix}norm", inner))
    return Layer(
        tensors=tuple(tensors),
        caches=(
            State(
                convolution=convolved,
                convolution_tokens=convolution_tokens - 1,
                recurrent=Part(size=inner.size * state_size, units=num_heads),
                is_float32=state_is_float32,
            ),
        ),
        widths=(Width(split=(*projected, *convolved, inner, inner)),),
        divisors=(("state-space heads", num_heads),),
    )


def gated_delta_net(
    *,
    hidden_size: int,
    num_key_heads: int,
    num_value_heads: int,
    key_head_dim: int,
    value_head_dim: int,
    convolution_tokens: int,
    state_is_float32: bool = False,
    prefix: str = "linear_attn.",
    modules: tuple[str, ...] = ("in_proj_qkvz", "in_proj_ba"),
) -> Layer:
    """Qwen3-Next's linear attention."""
    key = heads(num_key_heads, key_head_dim)
    value = heads(num_value_heads, value_head_dim)
    head = even(num_value_heads)
    convolved = (key, key, value)
    wide, narrow = modules[: len(modules) // 2], modules[len(modules) // 2 :]
    tensors = (
        Tensor(
            kind="linear",
            modules=tuple(f"{prefix}{module}" for module in wide),
            rows=(*convolved, value),
            columns=whole(hidden_size),
        ),
        Tensor(
            kind="linear",
            modules=tuple(f"{prefix}{module}" for module in narrow),
            rows=(head, head),
            columns=whole(hidden_size),
        ),
        _convolution(f"{prefix}conv1d", convolved, convolution_tokens),
        vector(f"{prefix}A_log", head, is_float32=True),
        vector(f"{prefix}dt_bias", head),
        vector(f"{prefix}norm", whole(value_head_dim)),
        *linear(f"{prefix}out_proj", whole(hidden_size), value).tensors,
    )
    return Layer(
        tensors=tensors,
        caches=(
            State(
                convolution=convolved,
                convolution_tokens=convolution_tokens - 1,
                recurrent=Part(size=value.size * key_head_dim, units=num_value_heads),
                is_float32=state_is_float32,
            ),
        ),
        # the projection, its convolved and its reordered copy, the output
        widths=(Width(split=(*convolved, value, *convolved, *convolved, value)),),
        divisors=(("linear-attention key heads", num_key_heads),),
    )


def _convolution(module: str, channels: tuple[Part, ...], tokens: int) -> Tensor:
    return Tensor(kind="plain", modules=(module,), rows=channels, columns=whole(tokens))
