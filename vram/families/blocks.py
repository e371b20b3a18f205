"""Attention, feed-forward layers, norms and embeddings as transformers and vLLM build them."""

from typing import Literal

from vram.parts import (
    KeysAndValues,
    Layer,
    Part,
    Routing,
    Tensor,
    Width,
    even,
    heads,
    vector,
    whole,
)

QKNorm = Literal["none", "head", "all_heads", "each_head"]


def attention(
    *,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int = 0,
    prefix: str = "self_attn.",
    qkv_bias: bool = False,
    output_bias: bool = False,
    key_bias: bool | None = None,  # Whisper's keys have none
    qk_norm: QKNorm = "none",
    gated: bool = False,  # the query projection makes a gate too
    sinks: bool = False,
    window_tokens: int | None = None,
    cached: bool = True,
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj"),
) -> Layer:
    """Multi-head, grouped-query or multi-query attention."""
    value_dim = value_dim or head_dim
    # With a gate, the two halves of a head stay on one GPU.
    query = Part(size=num_heads * (2 if gated else 1) * head_dim, units=num_heads)
    key, value = heads(num_kv_heads, head_dim), heads(num_kv_heads, value_dim)
    *projections, output = (f"{prefix}{module}" for module in modules)
    tensors = [
        Tensor(
            kind="linear",
            modules=tuple(projections),
            rows=(query, key, value),
            columns=whole(hidden_size),
        ),
        Tensor(
            kind="linear",
            modules=(output,),
            rows=(whole(hidden_size),),
            columns=heads(num_heads, value_dim),
        ),
    ]
    if qkv_bias:
        biased = (query, key, value) if key_bias in (None, True) else (query, value)
        tensors.append(vector(f"{prefix}qkv_bias", *biased))
    if output_bias:
        tensors.append(vector(f"{prefix}o_bias", whole(hidden_size)))
    if sinks:
        tensors.append(vector(f"{prefix}sinks", even(num_heads)))
    tensors += _qk_norm(qk_norm, prefix, num_heads, num_kv_heads, head_dim)
    cache = KeysAndValues(
        num_heads=num_kv_heads,
        key_size=head_dim,
        value_size=value_dim,
        query_heads=num_heads,
        window_tokens=window_tokens,
    )
    return Layer(
        tensors=tuple(tensors),
        caches=(cache,) if cached else (),
        widths=(Width(split=(query, key, value, heads(num_heads, value_dim))),),
        divisors=(("attention heads", num_heads),),
        query_rows=num_heads * value_dim,
        biased_queries=qkv_bias,
    )


def _qk_norm(
    kind: QKNorm, prefix: str, num_heads: int, num_kv_heads: int, head_dim: int
) -> list[Tensor]:
    sides: dict[QKNorm, tuple[Part, Part]] = {
        "head": (whole(head_dim), whole(head_dim)),
        "all_heads": (heads(num_heads, head_dim), heads(num_kv_heads, head_dim)),
        "each_head": (heads(num_heads, head_dim), heads(num_kv_heads, head_dim)),
    }
    if kind == "none":
        return []
    query, key = sides[kind]
    return [vector(f"{prefix}q_norm", query), vector(f"{prefix}k_norm", key)]


def mlp(
    *,
    hidden_size: int,
    intermediate_size: int,
    prefix: str = "mlp.",
    gated: bool = True,
    bias: bool = False,
    modules: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
) -> Layer:
    """A feed-forward layer; gate and up are one tensor."""
    *inward, outward = (f"{prefix}{module}" for module in modules)
    sides = (even(intermediate_size),) * (2 if gated else 1)
    tensors = [
        Tensor(
            kind="linear",
            modules=tuple(inward),
            rows=sides,
            columns=whole(hidden_size),
        ),
        Tensor(
            kind="linear",
            modules=(outward,),
            rows=(whole(hidden_size),),
            columns=even(intermediate_size),
        ),
    ]
    if bias:
        tensors.append(vector(f"{prefix}bias", *sides, whole(hidden_size)))
    # gate, up and their product; or up and its activation
    width = Width(split=(even(intermediate_size),) * (3 if gated else 2))
    return Layer(
        tensors=tuple(tensors),
        widths=(width,),
        divisors=(("feed-forward rows", intermediate_size),),
    )


def experts(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    experts_per_token: int,
    prefix: str = "mlp.",
    router: str = "gate",
    router_bias: bool = False,
    correction_bias: bool = False,
    gated: bool = True,
    bias: bool = False,
    input_size: int = 0,  # Nemotron's experts work on a smaller vector
) -> Layer:
    """Routed experts, fused as vLLM does: all gates and ups in one tensor, all downs in another."""
    input_size = input_size or hidden_size
    sides = (even(intermediate_size),) * (2 if gated else 1)
    tensors = [
        Tensor(
            kind="plain",  # routers are not quantised by any engine of ours
            modules=(f"{prefix}{router}",),
            rows=(whole(num_experts),),
            columns=whole(hidden_size),
        ),
        Tensor(
            kind="expert",
            modules=(f"{prefix}experts.0.gate_proj", f"{prefix}experts.0.up_proj"),
            rows=sides,
            columns=whole(input_size),
            copies=num_experts,
        ),
        Tensor(
            kind="expert",
            modules=(f"{prefix}experts.0.down_proj",),
            rows=(whole(input_size),),
            columns=even(intermediate_size),
            copies=num_experts,
        ),
    ]
    if router_bias:
        tensors.append(vector(f"{prefix}{router}.bias", whole(num_experts)))
    if correction_bias:
        tensors.append(
            vector(f"{prefix}{router}.e_score_correction_bias", whole(num_experts), is_float32=True)
        )
    if bias:
        tensors.append(
            Tensor(
                kind="plain",
                modules=(f"{prefix}experts.bias",),
                rows=(*sides, whole(input_size)),
                copies=num_experts,
            )
        )
    return Layer(
        tensors=tuple(tensors),
        routing=Routing(
            experts_per_token=experts_per_token,
            rows=even(intermediate_size),
            input_size=input_size,
            is_gated=gated,
        ),
    )


def norms(
    size: int, count: int, *, bias: bool = False, prefix: str = "", names: tuple[str, ...] = ()
) -> Layer:
    """`count` norms of one block."""
    named = names or tuple(f"norm{index}" for index in range(count))
    sides = (whole(size),) * (2 if bias else 1)
    return Layer(tensors=tuple(vector(f"{prefix}{name}", *sides) for name in named[:count]))


def linear(
    module: str,
    rows: Part,
    columns: Part,
    *,
    bias: bool = False,
    kind: Literal["linear", "plain"] = "linear",
) -> Layer:
    """One projection."""
    matrix = Tensor(kind=kind, modules=(module,), rows=(rows,), columns=columns)
    return Layer(tensors=(matrix, vector(f"{module}.bias", rows)) if bias else (matrix,))


def embedding(module: str, num_rows: int, size: int, *, split: bool = True) -> Tensor:
    """A table of tokens or of positions; engines split the tokens' and repeat the positions'."""
    return Tensor(
        kind="embedding" if split else "plain",
        modules=(module,),
        rows=(even(num_rows) if split else whole(num_rows),),
        columns=whole(size),
    )
