"""Language models with a tower for images: the tower's tensors join those of the first stage."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vram.config_reader import ConfigReader
from vram.families import hybrids, routed, towers
from vram.families.blocks import linear, mlp
from vram.families.body import Body
from vram.families.decoders import DENSE, GEMMA3, QWEN2, QWEN3, build
from vram.families.routed import ROUTED
from vram.families.towers import Tower
from vram.parts import Layer, Tensor, array, even, joined, vector, whole

# transformers leaves out of a nested section what equals its class's default.
GEMMA3_TEXT: Mapping[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
SIGLIP: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
CLIP: Mapping[str, Any] = {**SIGLIP, "patch_size": 32}
PIXTRAL: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 1024,
    "patch_size": 16,
}
MISTRAL_TEXT: Mapping[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}
LLAMA_TEXT: Mapping[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
QWEN2_TOWER = {"embed_dim": 1280, "hidden_size": 3584}
QWEN2_5_TOWER = {"hidden_size": 3584, "out_hidden_size": 3584}
QWEN3_5_TOWER = {"hidden_size": 1152, "out_hidden_size": 3584, "patch_size": 16}
QWEN3_TOWER = {**QWEN3_5_TOWER, "deepstack_visual_indexes": [8, 16, 24]}
TEXT_DEFAULTS = {"llama": LLAMA_TEXT, "mistral": MISTRAL_TEXT}


def qwen2_vl(read: ConfigReader) -> Body:
    tower = towers.qwen(read.section("vision_config", QWEN2_TOWER), "2")
    return _with_tower(build(QWEN2, _text(read)), tower)


def qwen2_5_vl(read: ConfigReader) -> Body:
    tower = towers.qwen(read.section("vision_config", QWEN2_5_TOWER), "2.5")
    return _with_tower(build(QWEN2, _text(read)), tower)


def qwen3_vl(read: ConfigReader) -> Body:
    tower = towers.qwen(read.section("vision_config", QWEN3_TOWER), "3")
    return _with_tower(build(QWEN3, _text(read)), tower)


def qwen3_vl_moe(read: ConfigReader) -> Body:
    tower = towers.qwen(read.section("vision_config", QWEN3_TOWER), "3")
    return _with_tower(build(ROUTED["Qwen3MoeForCausalLM"], _text(read)), tower)


def qwen3_5(read: ConfigReader) -> Body:
    """Dense and routed; the embeddings are tied where the outer config says so."""
    text = _text(read)
    feed_forward = routed.qwen if text.has("num_experts") else _dense
    body = hybrids.qwen_hybrid(
        text, ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), feed_forward
    )
    return _with_tower(body, towers.qwen(read.section("vision_config", QWEN3_5_TOWER), "3"))


def gemma3(read: ConfigReader) -> Body:
    text = read.section("text_config", _outer(read, GEMMA3_TEXT))
    body = build(GEMMA3, text)
    vision = read.section("vision_config", SIGLIP)
    size = vision.integer("hidden_size")
    joint = (
        array("multi_modal_projector.mm_input_projection_weight", size, body.hidden_size),
        vector("multi_modal_projector.mm_soft_emb_norm", whole(size)),
    )
    return _with_tower(body, towers.siglip(vision), joint)


def mistral3(read: ConfigReader) -> Body:
    text = read.section("text_config", _outer(read, MISTRAL_TEXT))
    body = build(DENSE["MistralForCausalLM"], text)
    vision = read.section("vision_config", PIXTRAL)
    size = vision.integer("hidden_size")
    merge = read.integer("spatial_merge_size", default=2)
    joint = joined(
        Layer(tensors=(vector("multi_modal_projector.norm", whole(size)),)),
        linear(
            "multi_modal_projector.patch_merger.merging_layer",
            whole(size),
            whole(size * merge**2),
        ),
        _projector(read, size, body.hidden_size, bias=False),
    )
    tower = replace(towers.pixtral(vision), patches_per_token=merge**2)
    return _with_tower(body, tower, joint.tensors)


def llava(read: ConfigReader) -> Body:
    named = read.section("text_config").text("model_type", default="llama")
    text = read.section("text_config", _outer(read, TEXT_DEFAULTS.get(named, {})))
    body = build(DENSE["MistralForCausalLM" if named == "mistral" else "LlamaForCausalLM"], text)
    vision = read.section("vision_config", CLIP)
    joint = _projector(read, vision.integer("hidden_size"), body.hidden_size, bias=True)
    return _with_tower(body, towers.clip(vision), joint.tensors)


def llama4(read: ConfigReader) -> Body:
    body = build(ROUTED["Llama4ForCausalLM"], _text(read))
    vision = read.section("vision_config", {"vision_output_dim": 7680})
    joint = linear(
        "multi_modal_projector.linear_1",
        whole(body.hidden_size),
        whole(vision.integer("vision_output_dim", "projector_output_dim")),
    )
    return _with_tower(body, towers.llama4(vision), joint.tensors)


def _text(read: ConfigReader) -> ConfigReader:
    """The language model's part; the first Qwen2-VL configs were flat."""
    if not read.has("text_config"):
        return read
    return read.section("text_config", _outer(read, read.defaults))


def _outer(read: ConfigReader, defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """The outer config decides over tying, whatever its part leaves out."""
    if not read.has("tie_word_embeddings"):
        return defaults
    return {**defaults, "tie_word_embeddings": read.flag("tie_word_embeddings", default=False)}


def _dense(read: ConfigReader, layer: int) -> Layer:
    return mlp(
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
    )


def _projector(read: ConfigReader, vision_size: int, language_size: int, *, bias: bool) -> Layer:
    bias = read.flag("multimodal_projector_bias", default=bias)
    return joined(
        linear(
            "multi_modal_projector.linear_1", even(language_size), whole(vision_size), bias=bias
        ),
        linear(
            "multi_modal_projector.linear_2", whole(language_size), even(language_size), bias=bias
        ),
    )


def _with_tower(body: Body, tower: Tower, joint: tuple[Tensor, ...] = ()) -> Body:
    return replace(
        body,
        first=(*body.first, *tower.tensors, *joint),
        encoder_width=tower.width * tower.patches_per_token,
    )
