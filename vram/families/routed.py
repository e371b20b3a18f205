"""Mixtures of experts: which layers route, among how many, and what every token passes besides."""

from dataclasses import replace

from vram.config_reader import LARGEST_CONTEXT, MOST_EXPERTS, ConfigReader
from vram.errors import Invalid
from vram.families.blocks import experts, linear, mlp
from vram.families.decoders import LLAMA, MISTRAL, QWEN2, QWEN3, Decoder, is_set
from vram.families.windows import alternating, everywhere
from vram.parts import Layer, joined, whole


def mixtral(read: ConfigReader, layer: int) -> Layer:
    return experts(
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
        num_experts=read.integer("num_local_experts", "num_experts", highest=MOST_EXPERTS),
        experts_per_token=_experts_per_token(read),
        prefix="block_sparse_moe.",
    )


def qwen(read: ConfigReader, layer: int) -> Layer:
    """Every decoder_sparse_step-th layer routes; Qwen2-MoE and Qwen3-Next add a gated expert."""
    hidden_size = read.integer("hidden_size")
    step = read.integer("decoder_sparse_step", default=1)
    if layer in read.integers("mlp_only_layers") or (layer + 1) % step:
        return mlp(hidden_size=hidden_size, intermediate_size=read.integer("intermediate_size"))
    routed = experts(
        hidden_size=hidden_size,
        intermediate_size=read.integer("moe_intermediate_size"),
        num_experts=read.integer("num_experts", highest=MOST_EXPERTS),
        experts_per_token=_experts_per_token(read),
    )
    shared_size = read.integer("shared_expert_intermediate_size", lowest=0, default=0)
    if not shared_size:
        return routed
    return joined(
        routed,
        mlp(hidden_size=hidden_size, intermediate_size=shared_size, prefix="mlp.shared_expert."),
        linear("mlp.shared_expert_gate", whole(1), whole(hidden_size), kind="plain"),
    )


def gpt_oss(read: ConfigReader, layer: int) -> Layer:
    return experts(
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
        num_experts=read.integer("num_local_experts", highest=MOST_EXPERTS),
        experts_per_token=_experts_per_token(read),
        router="router",
        router_bias=True,
        bias=True,
    )


def olmoe(read: ConfigReader, layer: int) -> Layer:
    return experts(
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
        num_experts=read.integer("num_experts", highest=MOST_EXPERTS),
        experts_per_token=_experts_per_token(read),
    )


def granite(read: ConfigReader, layer: int) -> Layer:
    routed = experts(
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
        num_experts=read.integer("num_local_experts", highest=MOST_EXPERTS),
        experts_per_token=_experts_per_token(read),
        prefix="block_sparse_moe.",
        router="router",
    )
    shared_size = read.integer("shared_intermediate_size", lowest=0, default=0)
    if not shared_size:
        return routed
    shared = mlp(
        hidden_size=read.integer("hidden_size"),
        intermediate_size=shared_size,
        prefix="shared_mlp.",
    )
    return joined(routed, shared)


def deepseek(read: ConfigReader, layer: int) -> Layer:
    """The first layers are dense; the rest route, beside experts that every token passes."""
    hidden_size = read.integer("hidden_size")
    first = read.integer("first_k_dense_replace", lowest=0, default=0)
    step = read.integer("moe_layer_freq", default=1)
    num_experts = read.integer("n_routed_experts", lowest=0, default=0, highest=MOST_EXPERTS)
    if not num_experts or layer < first or layer % step:
        return mlp(hidden_size=hidden_size, intermediate_size=read.integer("intermediate_size"))
    expert_size = read.integer("moe_intermediate_size")
    routed = experts(
        hidden_size=hidden_size,
        intermediate_size=expert_size,
        num_experts=num_experts,
        experts_per_token=_experts_per_token(read),
        # "noaux_tc" balances by a bias; transformers' own DeepSeek-V3 always has it.
        correction_bias=read.text("topk_method", default="noaux_tc") == "noaux_tc",
    )
    num_shared = read.integer("n_shared_experts", lowest=0, default=0, highest=MOST_EXPERTS)
    if not num_shared:
        return routed
    shared = mlp(
        hidden_size=hidden_size,
        intermediate_size=expert_size * num_shared,
        prefix="mlp.shared_experts.",
    )
    return joined(routed, shared)


def minimax(read: ConfigReader, layer: int) -> Layer:
    return experts(
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
        num_experts=read.integer("num_local_experts", highest=MOST_EXPERTS),
        experts_per_token=_experts_per_token(read),
        prefix="block_sparse_moe.",
        correction_bias=True,
    )


def ernie(read: ConfigReader, layer: int) -> Layer:
    hidden_size = read.integer("hidden_size")
    bias = is_set("use_bias", read)
    start = read.integer("moe_layer_start_index", lowest=0, default=1)
    end = read.integer("moe_layer_end_index", lowest=-1, default=-1)
    interval = read.integer("moe_layer_interval", default=1)
    last = end if end >= 0 else read.layers() - 1
    if (layer + 1) % interval or not start <= layer <= last:
        return mlp(
            hidden_size=hidden_size,
            intermediate_size=read.integer("intermediate_size"),
            bias=bias,
        )
    expert_size = read.integer("moe_intermediate_size")
    routed = experts(
        hidden_size=hidden_size,
        intermediate_size=expert_size,
        num_experts=read.integer("moe_num_experts", "num_experts", highest=MOST_EXPERTS),
        experts_per_token=read.integer("moe_k", "num_experts_per_tok", highest=MOST_EXPERTS),
        correction_bias=True,
    )
    num_shared = read.integer("moe_num_shared_experts", lowest=0, default=0, highest=MOST_EXPERTS)
    if not num_shared:
        return routed
    shared = mlp(
        hidden_size=hidden_size,
        intermediate_size=expert_size * num_shared,
        prefix="mlp.shared_experts.",
        bias=bias,
    )
    return joined(routed, shared)


def llama4(read: ConfigReader, layer: int) -> Layer:
    hidden_size = read.integer("hidden_size")
    step = read.integer("interleave_moe_layer_step", default=1)
    routing = read.integers("moe_layers")
    routes = layer in routing if routing else (layer + 1) % step == 0
    if not routes:
        return mlp(
            hidden_size=hidden_size,
            intermediate_size=read.integer("intermediate_size_mlp"),
            prefix="feed_forward.",
        )
    expert_size = read.integer("intermediate_size")
    return joined(
        experts(
            hidden_size=hidden_size,
            intermediate_size=expert_size,
            num_experts=read.integer("num_local_experts", highest=MOST_EXPERTS),
            experts_per_token=_experts_per_token(read),
            prefix="feed_forward.",
            router="router",
        ),
        mlp(
            hidden_size=hidden_size,
            intermediate_size=expert_size,
            prefix="feed_forward.shared_expert.",
        ),
    )


def llama4_windows(read: ConfigReader, num_layers: int) -> list[int | None]:
    """Three layers of four attend within chunks; the fourth, without positions, to everything."""
    chunk = read.integer("attention_chunk_size", default=8192, highest=LARGEST_CONTEXT)
    interval = read.integer("no_rope_layer_interval", default=4)
    rotates = read.integers("no_rope_layers") or [
        int((index + 1) % interval != 0) for index in range(num_layers)
    ]
    if len(rotates) != num_layers:
        raise Invalid(
            f"config.json: {len(rotates)} no_rope_layers for {num_layers} layers", "no_rope_layers"
        )
    return [chunk if rotated else None for rotated in rotates]


def _experts_per_token(read: ConfigReader) -> int:
    return read.integer("num_experts_per_tok", "experts_per_token", highest=MOST_EXPERTS)


ROUTED: dict[str, Decoder] = {
    "MixtralForCausalLM": replace(MISTRAL, feed_forward=mixtral, routed=True),
    "Qwen2MoeForCausalLM": replace(QWEN2, feed_forward=qwen, routed=True, qkv_bias=True),
    "Qwen3MoeForCausalLM": replace(QWEN3, feed_forward=qwen, routed=True),
    "GptOssForCausalLM": Decoder(
        feed_forward=gpt_oss,
        routed=True,
        sinks=True,
        head_dim=64,
        windows=alternating,
    ),
    "OlmoeForCausalLM": Decoder(
        feed_forward=olmoe, routed=True, qk_norm="all_heads", mlp_bias=False
    ),
    "PhiMoEForCausalLM": Decoder(
        feed_forward=mixtral,
        routed=True,
        norm_bias=True,
        head_bias="lm_head_bias",
        windows=everywhere,
    ),
    "GraniteMoeForCausalLM": replace(LLAMA, feed_forward=granite, routed=True),
    "GraniteMoeSharedForCausalLM": replace(LLAMA, feed_forward=granite, routed=True),
    "Glm4MoeForCausalLM": Decoder(
        output_bias=False,
        mlp_bias=False,
        feed_forward=deepseek,
        routed=True,
        qk_norm="head",
        qk_norm_key="use_qk_norm",
    ),
    "MiniMaxM2ForCausalLM": Decoder(
        qkv_bias=False,
        output_bias=False,
        feed_forward=minimax,
        routed=True,
        qk_norm="all_heads",
    ),
    "Ernie4_5_MoeForCausalLM": Decoder(
        qkv_bias="use_bias", output_bias="use_bias", feed_forward=ernie, routed=True, tied=True
    ),
    "Llama4ForCausalLM": Decoder(feed_forward=llama4, routed=True, windows=llama4_windows),
}
