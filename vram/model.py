"""What a model is made of, read from its config.json. Knows nothing of cards, engines or files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vram.architectures import ARCHITECTURES, Architecture
from vram.config_reader import ConfigReader
from vram.dtypes import canonical_dtype
from vram.errors import Invalid, UnknownArchitecture
from vram.quantization import Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The routed feed-forward layers of a mixture of experts."""

    num_layers: int
    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The layers that keep only the last tokens of a context."""

    num_layers: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Every number of a decoder that its memory depends on."""

    architecture: str
    dtype: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int
    tied_embeddings: bool
    gated_mlp: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    norms_per_layer: int
    window: Window | None
    experts: Experts | None
    quantization: Quantization | None

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> "ModelShape":
        """Reads a Hugging Face config.json; says what is missing instead of assuming it."""
        read = ConfigReader(config)
        name, family = _architecture(read)
        hidden_size = read.integer("hidden_size", highest=1 << 17)
        num_layers = read.integer("num_hidden_layers", highest=1024)
        num_heads = read.integer("num_attention_heads", highest=1024)
        num_kv_heads = read.integer("num_key_value_heads", default=num_heads, highest=1024)
        if num_heads % num_kv_heads:
            raise Invalid(
                f"config.json: {num_heads} attention heads do not divide "
                f"into {num_kv_heads} key-value heads",
                "num_key_value_heads",
            )
        head_dim = family.head_dim or hidden_size // num_heads
        shape = ModelShape(
            architecture=name,
            dtype=canonical_dtype(read.text("dtype", "torch_dtype", default="float32")),
            num_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=read.integer("intermediate_size", highest=1 << 20),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=read.integer("head_dim", default=head_dim, highest=1 << 12),
            vocab_size=read.integer("vocab_size", highest=1 << 22),
            max_context_tokens=read.integer("max_position_embeddings", highest=1 << 27),
            tied_embeddings=read.flag("tie_word_embeddings", default=family.tied_embeddings),
            gated_mlp=family.gated_mlp,
            qkv_bias=_bias(family.qkv_bias, read, "attention_bias"),
            output_bias=_bias(family.output_bias, read, "attention_bias"),
            mlp_bias=_bias(family.mlp_bias, read, "mlp_bias"),
            qk_norm=family.qk_norm,
            norms_per_layer=family.norms_per_layer,
            window=_window(family, read, num_layers),
            experts=_experts(family, read, num_layers),
            quantization=Quantization.from_config(config.get("quantization_config")),
        )
        return shape

    @property
    def parameter_count(self) -> int:
        """Parameters of the checkpoint: tied embeddings once, no padding."""
        from vram.weights import parameter_count  # the tensors are counted where they are listed

        return parameter_count(self)


def _architecture(read: ConfigReader) -> tuple[str, Architecture]:
    names = read.texts("architectures")
    if not names:
        raise UnknownArchitecture("(none)", "config.json has no architectures.")
    for name in names:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    raise UnknownArchitecture(
        names[0], f"its layers are not in our table; known are {', '.join(ARCHITECTURES)}."
    )


def _bias(always: bool | None, read: ConfigReader, key: str) -> bool:
    return read.flag(key, default=False) if always is None else always


def _window(family: Architecture, read: ConfigReader, num_layers: int) -> Window | None:
    tokens = read.integer("sliding_window", default=0, lowest=0, highest=1 << 27)
    if family.windows == "none" or tokens == 0:
        return None
    if family.windows == "qwen" and not read.flag("use_sliding_window", default=False):
        return None
    layer_types = read.texts("layer_types")
    if layer_types:
        if len(layer_types) != num_layers:
            raise Invalid(
                f"config.json: {len(layer_types)} layer_types for {num_layers} layers",
                "layer_types",
            )
        num_windowed = layer_types.count("sliding_attention")
    elif family.windows == "all":
        num_windowed = num_layers
    elif family.windows == "alternate":
        num_windowed = num_layers - num_layers // 2
    elif family.windows == "one_in_pattern_is_full":
        pattern = read.integer("sliding_window_pattern", default=6, highest=1024)
        num_windowed = num_layers - num_layers // pattern
    else:
        first = read.integer("max_window_layers", default=28, lowest=0, highest=1024)
        num_windowed = max(num_layers - first, 0)
    return Window(num_layers=num_windowed, tokens=tokens) if num_windowed else None


def _experts(family: Architecture, read: ConfigReader, num_layers: int) -> Experts | None:
    if family.experts == "mixtral":
        return Experts(
            num_layers=num_layers,
            num_experts=read.integer("num_local_experts", highest=4096),
            experts_per_token=read.integer("num_experts_per_tok", highest=4096),
            intermediate_size=read.integer("intermediate_size", highest=1 << 20),
            shared_intermediate_size=0,
        )
    if family.experts == "qwen":
        dense = set(read.integers("mlp_only_layers"))
        step = read.integer("decoder_sparse_step", default=1, highest=1024)
        routed = [n for n in range(num_layers) if n not in dense and (n + 1) % step == 0]
        return Experts(
            num_layers=len(routed),
            num_experts=read.integer("num_experts", highest=4096),
            experts_per_token=read.integer("num_experts_per_tok", highest=4096),
            intermediate_size=read.integer("moe_intermediate_size", highest=1 << 20),
            shared_intermediate_size=read.integer(
                "shared_expert_intermediate_size", default=0, lowest=0, highest=1 << 20
            ),
        )
    return None
