"""Models that mix attention with state-space or linear-attention layers."""

from collections.abc import Callable

from vram.config_reader import MOST_EXPERTS, ConfigReader
from vram.errors import Invalid
from vram.families import routed
from vram.families.blocks import attention, experts, mlp, norms
from vram.families.body import Body, ends, max_context, rope_elements
from vram.families.decoders import head_counts
from vram.families.mixers import gated_delta_net, mamba, mamba2
from vram.families.state_spaces import step_rank
from vram.parts import Layer, joined

FLOAT32 = "float32"


def jamba(read: ConfigReader) -> Body:
    """AI21's Jamba: one attention layer in eight, experts in every second."""
    hidden_size = read.integer("hidden_size")
    attends = _periodic(read, "attn_layer_period", 8, "attn_layer_offset", 4)
    routes = _periodic(read, "expert_layer_period", 2, "expert_layer_offset", 1)
    num_experts = read.integer("num_experts", default=16, highest=MOST_EXPERTS)
    inner_size = read.integer("mamba_expand", default=2) * hidden_size
    state_space = mamba(
        hidden_size=hidden_size,
        inner_size=inner_size,
        state_size=read.integer("mamba_d_state", default=16),
        step_rank=step_rank(read, "mamba_dt_rank", hidden_size),
        convolution_tokens=read.integer("mamba_d_conv", default=4),
        bias=read.flag("mamba_proj_bias", default=False),
        convolution_bias=read.flag("mamba_conv_bias", default=True),
        step_norms=True,
    )
    attending = plain_attention(read)
    dense = mlp(
        hidden_size=hidden_size,
        intermediate_size=read.integer("intermediate_size"),
        prefix="feed_forward.",
    )
    routing = experts(
        hidden_size=hidden_size,
        intermediate_size=read.integer("intermediate_size"),
        num_experts=num_experts,
        experts_per_token=read.integer("num_experts_per_tok", default=2, highest=MOST_EXPERTS),
        prefix="feed_forward.",
        router="router",
    )
    return assembled(
        read,
        [
            (
                attending if attends(index) else state_space,
                routing if routes(index) and num_experts > 1 else dense,
            )
            for index in range(read.layers())
        ],
        has_rope=False,
        routed_layers=num_experts > 1,
    )


def qwen3_next(read: ConfigReader) -> Body:
    """Three layers of gated delta nets, then one of gated attention; experts everywhere."""
    return qwen_hybrid(read, ("in_proj_qkvz", "in_proj_ba"), routed.qwen)


def qwen_hybrid(
    read: ConfigReader,
    modules: tuple[str, ...],
    feed_forward: Callable[[ConfigReader, int], Layer],
    layer_prefix: str = "model.layers.",
) -> Body:
    """Qwen3-Next and Qwen3.5."""
    num_layers = read.layers()
    kinds = read.texts("layer_types")
    if not kinds:
        interval = read.integer("full_attention_interval", default=4)
        kinds = [
            "full_attention" if (index + 1) % interval == 0 else "linear_attention"
            for index in range(num_layers)
        ]
    _check_length(kinds, num_layers, "layer_types")
    delta_net = gated_delta_net(
        hidden_size=read.integer("hidden_size"),
        num_key_heads=read.heads("linear_num_key_heads"),
        num_value_heads=read.heads("linear_num_value_heads"),
        key_head_dim=read.integer("linear_key_head_dim"),
        value_head_dim=read.integer("linear_value_head_dim"),
        convolution_tokens=read.integer("linear_conv_kernel_dim", default=4),
        state_is_float32=read.text("mamba_ssm_dtype", default="auto") == FLOAT32,
        modules=modules,
    )
    attending = plain_attention(read, qk_norm=True, gated=True)
    return assembled(
        read,
        [
            (attending if kind == "full_attention" else delta_net, feed_forward(read, index))
            for index, kind in enumerate(kinds)
        ],
        layer_prefix=layer_prefix,
        routed_layers=read.has("num_experts"),
    )


def bamba(read: ConfigReader) -> Body:
    """IBM's Bamba."""
    num_layers = read.layers()
    indices = set(read.integers("attn_layer_indices"))
    dense = mlp(
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
        bias=read.flag("mlp_bias", default=False),
        prefix="feed_forward.",
    )
    state_space, attending = _mamba2(read), plain_attention(read)
    return assembled(
        read,
        [(attending if index in indices else state_space, dense) for index in range(num_layers)],
    )


def granite_hybrid(read: ConfigReader) -> Body:
    """Granite 4: mostly state-space layers, an expert layer with a shared part in each."""
    num_layers = read.layers()
    kinds = read.texts("layer_types") or read.texts("layers_block_type")
    _check_length(kinds, num_layers, "layer_types")
    num_experts = read.integer("num_local_experts", lowest=0, default=0, highest=MOST_EXPERTS)
    shared = mlp(
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("shared_intermediate_size"),
        prefix="shared_mlp.",
    )
    feed_forward = routed.granite(read, 0) if num_experts else shared
    state_space, attending = _mamba2(read), plain_attention(read)
    return assembled(
        read,
        [(attending if kind == "attention" else state_space, feed_forward) for kind in kinds],
        has_rope=read.text("position_embedding_type", default="nope") == "rope",
        routed_layers=num_experts > 0,
    )


def _mamba2(read: ConfigReader) -> Layer:
    """Under the names of Bamba and Granite."""
    hidden_size = read.integer("hidden_size")
    num_heads = read.heads("mamba_n_heads")
    inner_size = read.integer("mamba_expand", default=2) * hidden_size
    return mamba2(
        hidden_size=hidden_size,
        num_heads=num_heads,
        head_dim=inner_size // num_heads
        if read.is_text("mamba_d_head")
        else read.integer("mamba_d_head", default=max(inner_size // num_heads, 1)),
        num_groups=read.heads("mamba_n_groups", default=1),
        state_size=read.integer("mamba_d_state"),
        convolution_tokens=read.integer("mamba_d_conv", default=4),
        bias=read.flag("mamba_proj_bias", default=False),
        convolution_bias=read.flag("mamba_conv_bias", default=True),
        prefix="mamba.",
    )


def plain_attention(
    read: ConfigReader,
    *,
    prefix: str = "self_attn.",
    qk_norm: bool = False,
    gated: bool = False,
    head_dim_keys: tuple[str, ...] = (),
) -> Layer:
    num_heads, num_kv_heads, head_dim = head_counts(read)
    if head_dim_keys and not read.has("head_dim"):
        head_dim = read.integer(*head_dim_keys, default=head_dim)
    bias = read.flag("attention_bias", default=False)
    return attention(
        hidden_size=read.integer("hidden_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        prefix=prefix,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head" if qk_norm else "none",
        gated=gated,
    )


def assembled(
    read: ConfigReader,
    blocks: list[tuple[Layer, ...]],
    *,
    norms_per_layer: int = 2,
    has_rope: bool = True,
    layer_prefix: str = "model.layers.",
    embedding_module: str = "model.embed_tokens",
    routed_layers: bool = False,
) -> Body:
    hidden_size, vocab_size = read.integer("hidden_size"), read.integer("vocab_size")
    tied = read.flag("tie_word_embeddings", default=False)
    normed = norms(hidden_size, norms_per_layer)
    known: dict[tuple[Layer, ...], Layer] = {}
    layers = tuple(known.setdefault(block, joined(normed, *block)) for block in blocks)
    first, last, head = ends(
        read,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        tied=tied,
        embedding_module=embedding_module,
    )
    return Body(
        layers=layers,
        layer_prefix=layer_prefix,
        first=first,
        last=last,
        head=head,
        tied=tied,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        max_context_tokens=max_context(read),
        rope_elements=rope_elements(read, head_counts(read)[2]) if has_rope else 0,
        routed=routed_layers,
    )


def _periodic(
    read: ConfigReader, period_key: str, period: int, offset_key: str, offset: int
) -> Callable[[int], bool]:
    every = read.integer(period_key, default=period)
    start = read.integer(offset_key, lowest=0, default=offset)
    return lambda index: index % every == start


def _check_length(kinds: list[str], num_layers: int, key: str) -> None:
    if len(kinds) != num_layers:
        raise Invalid(f"config.json: {len(kinds)} {key} for {num_layers} layers", key)
