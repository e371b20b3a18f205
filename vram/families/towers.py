"""The encoders of images beside a language model, and what joins the two."""

from dataclasses import dataclass

from vram.config_reader import ConfigReader
from vram.families.blocks import attention, linear, mlp, norms
from vram.parts import Layer, Tensor, array, even, joined, prefixed, vector, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """The tensors, and what the largest image costs while it is encoded."""

    tensors: tuple[Tensor, ...]
    patches_per_token: int  # patches that are merged into one token of the language model
    width: int  # elements per patch at the widest point of a block


def qwen(read: ConfigReader, generation: str) -> Tower:
    """The towers of Qwen2-VL ("2"), Qwen2.5-VL ("2.5"), Qwen3-VL and Qwen3.5 ("3")."""
    size = read.integer("embed_dim", "hidden_size")
    depth = read.layers("depth")
    num_heads = read.heads("num_heads")
    merge = read.integer("spatial_merge_size", default=2)
    language_size = read.integer("out_hidden_size", "hidden_size")
    patch = (
        read.integer("in_channels", "in_chans", default=3)
        * read.integer("temporal_patch_size", default=2)
        * read.integer("patch_size", "spatial_patch_size", default=14) ** 2
    )
    if generation == "2":
        feed_forward_size = size * read.integer("mlp_ratio", default=4)
        language_size = read.integer("hidden_size")
    else:
        feed_forward_size = read.integer("intermediate_size")
    layer_norm_bias = generation != "2.5"
    block = joined(
        norms(size, 2, bias=layer_norm_bias),
        _attention(size, num_heads, bias=True, prefix="attn."),
        mlp(
            hidden_size=size,
            intermediate_size=feed_forward_size,
            gated=generation == "2.5",
            bias=True,
        ),
    )
    merged = size * merge**2

    def merger(normed_size: int, module: str) -> Layer:
        return joined(
            norms(normed_size, 1, bias=layer_norm_bias, names=(f"{module}.norm",)),
            linear(f"{module}.mlp.0", even(merged), whole(merged), bias=True),
            linear(f"{module}.mlp.2", whole(language_size), even(merged), bias=True),
        )

    parts = [
        Layer(tensors=(array("patch_embed.proj", size, patch),)),
        *(prefixed(block, f"blocks.{index}.") for index in range(depth)),
        merger(size, "merger"),
    ]
    if generation == "3":
        positions = read.integer("num_position_embeddings")
        ends = (vector("patch_embed.proj.bias", whole(size)), array("pos_embed", positions, size))
        parts.append(Layer(tensors=ends))
        deep = read.integers("deepstack_visual_indexes")[:depth]
        parts += [merger(merged, f"deepstack_merger_list.{index}") for index in range(len(deep))]
    return Tower(
        tensors=prefixed(joined(*parts), "visual.").tensors,
        patches_per_token=merge**2,
        width=6 * size + feed_forward_size * (3 if generation == "2.5" else 2),
    )


def siglip(read: ConfigReader, prefix: str = "vision_tower.vision_model.") -> Tower:
    """Gemma 3's and PaliGemma's."""
    return _vit(read, prefix, patch_bias=True, before=False, class_token=False)


def clip(read: ConfigReader, prefix: str = "vision_tower.vision_model.") -> Tower:
    """LLaVA's: a class token, a norm before and one after."""
    return _vit(read, prefix, patch_bias=False, before=True, class_token=True)


def pixtral(read: ConfigReader, prefix: str = "vision_tower.") -> Tower:
    """Mistral's: no biases, RMS norms, a gated feed-forward layer."""
    size = read.integer("hidden_size")
    feed_forward_size = read.integer("intermediate_size")
    patch = read.integer("num_channels", default=3) * read.integer("patch_size", default=16) ** 2
    block = joined(
        norms(size, 2),
        _attention(size, read.heads(), bias=False, prefix="attention."),
        mlp(hidden_size=size, intermediate_size=feed_forward_size, prefix="feed_forward."),
    )
    parts = [
        Layer(tensors=(array("patch_conv", size, patch), vector("ln_pre", whole(size)))),
        *(prefixed(block, f"transformer.layers.{index}.") for index in range(read.layers())),
    ]
    return Tower(
        tensors=prefixed(joined(*parts), prefix).tensors,
        patches_per_token=1,
        width=6 * size + 3 * feed_forward_size,
    )


def llama4(read: ConfigReader, prefix: str = "vision_model.") -> Tower:
    size = read.integer("hidden_size")
    feed_forward_size = read.integer("intermediate_size")
    patch_size = read.integer("patch_size")
    num_patches = (read.integer("image_size") // patch_size) ** 2 + 1
    block = joined(
        norms(size, 2, bias=True),
        _attention(size, read.heads(), bias=True),
        mlp(hidden_size=size, intermediate_size=feed_forward_size, gated=False, bias=True),
    )
    adapter_in = read.integer("projector_input_dim")
    adapter_out = read.integer("projector_output_dim")
    parts = [
        *(prefixed(block, f"model.layers.{index}.") for index in range(read.layers())),
        linear(
            "patch_embedding.linear",
            whole(size),
            whole(read.integer("num_channels", default=3) * patch_size**2),
        ),
        Layer(
            tensors=(
                vector("class_embedding", whole(size)),
                array("positional_embedding_vlm", num_patches, size),
            )
        ),
        norms(size, 2, bias=True, names=("layernorm_pre", "layernorm_post")),
        linear("vision_adapter.mlp.fc1", whole(adapter_in), whole(feed_forward_size)),
        linear("vision_adapter.mlp.fc2", whole(adapter_out), whole(adapter_out)),
    ]
    return Tower(
        tensors=prefixed(joined(*parts), prefix).tensors,
        patches_per_token=4,
        width=6 * size + 2 * feed_forward_size,
    )


def _vit(
    read: ConfigReader, prefix: str, *, patch_bias: bool, before: bool, class_token: bool
) -> Tower:
    """A plain vision transformer, as CLIP and SigLIP are."""
    size = read.integer("hidden_size")
    feed_forward_size = read.integer("intermediate_size")
    patch_size = read.integer("patch_size")
    num_patches = (read.integer("image_size") // patch_size) ** 2
    block = joined(
        norms(size, 2, bias=True),
        _attention(size, read.heads(), bias=True),
        mlp(
            hidden_size=size,
            intermediate_size=feed_forward_size,
            gated=False,
            bias=True,
            modules=("fc1", "fc2"),
        ),
    )
    patch = read.integer("num_channels", default=3) * patch_size**2
    ends = [
        array("embeddings.patch_embedding", size, patch),
        array("embeddings.position_embedding", num_patches + class_token, size),
    ]
    if patch_bias:
        ends.append(vector("embeddings.patch_embedding.bias", whole(size)))
    if class_token:
        ends.append(vector("embeddings.class_embedding", whole(size)))
    parts = [
        Layer(tensors=tuple(ends)),
        *(prefixed(block, f"encoder.layers.{index}.") for index in range(read.layers())),
        norms(size, 1 + before, bias=True, names=("post_layernorm", "pre_layrnorm")),
    ]
    return Tower(
        tensors=prefixed(joined(*parts), prefix).tensors,
        patches_per_token=1,
        width=6 * size + 2 * feed_forward_size,
    )


def _attention(size: int, num_heads: int, *, bias: bool, prefix: str = "self_attn.") -> Layer:
    return attention(
        hidden_size=size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=max(size // num_heads, 1),
        prefix=prefix,
        qkv_bias=bias,
        output_bias=bias,
        cached=False,
    )
