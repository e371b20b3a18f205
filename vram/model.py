"""What a model is made of, read from its config.json. Knows nothing of cards, engines or files."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vram.architectures import ARCHITECTURES, Builder
from vram.class_defaults import class_defaults
from vram.config_reader import ConfigReader
from vram.dtypes import canonical_dtype
from vram.errors import UnknownArchitecture
from vram.families.body import Body
from vram.parts import (
    Cache,
    KeysAndValues,
    Latent,
    Layer,
    Packing,
    Routing,
    State,
    Tensor,
    Unpacking,
    Width,
)
from vram.quantization import Quantization
from vram.residuals import LoadKind, Residuals

# Equal tensors and how many there are of them: a tower of 32 blocks is a dozen entries.
Tensors = tuple[tuple[Tensor, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A kind of layer, its number formats settled."""

    tensors: Tensors
    caches: tuple[Cache, ...]
    widths: tuple[Width, ...]
    routing: Routing | None
    unpacking: Unpacking | None
    biased_queries: bool

    @property
    def fuses_experts(self) -> bool:
        """Whether one kernel takes tokens through their experts: so for MXFP4 (triton_kernels)."""
        packings = {t.packing.method for t, _ in self.tensors if t.kind == "expert" and t.packing}
        return "mxfp4" in packings


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Everything of a model that its memory depends on."""

    architecture: str
    dtype: str
    hidden_size: int
    vocab_size: int
    max_context_tokens: int
    kinds: tuple[Block, ...]
    order: tuple[int, ...]  # of the layers, as indices into kinds
    first: Tensors  # what the first stage of a pipeline holds besides its layers
    last: Tensors
    head: Tensor | None  # None: the embedding's own, or there is none
    tied_embeddings: bool
    rope_elements: int
    divisors: tuple[tuple[str, int], ...]  # what a tensor-parallel degree has to divide
    query_rows: int  # the widest attention output
    generates: bool
    routed: bool
    encoder_width: int
    quantization: str | None
    kv_cache_dtype: str | None  # what the checkpoint asks for
    # What the headers of the checkpoint hold for each byte that the config implies.
    checkpoint_ratio: float = 1.0
    # What its loads took, by kind of load. vram/calibration.py
    learned: tuple[Residuals, ...] = ()

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> "ModelShape":
        """Reads a Hugging Face config.json; says what is missing instead of assuming it."""
        name, builder = _architecture(ConfigReader(config))
        read = ConfigReader(config, defaults=class_defaults(name))
        body = builder(read)
        quantization = _quantization(read)
        kinds, order = _blocks(body, quantization)
        pack = _packer(quantization)
        return ModelShape(
            architecture=name,
            dtype=_dtype(read),
            hidden_size=body.hidden_size,
            vocab_size=body.vocab_size,
            max_context_tokens=body.max_context_tokens,
            kinds=kinds,
            order=order,
            first=_counted(pack(tensor, "") for tensor in body.first),
            last=_counted(pack(tensor, "") for tensor in body.last),
            head=None if body.head is None else pack(body.head, ""),
            tied_embeddings=body.tied,
            rope_elements=body.rope_elements,
            divisors=tuple(
                dict.fromkeys(divisor for layer in set(body.layers) for divisor in layer.divisors)
            ),
            query_rows=max((layer.query_rows for layer in set(body.layers)), default=0),
            generates=body.generates,
            routed=body.routed,
            encoder_width=body.encoder_width,
            quantization=quantization.method if quantization else None,
            kv_cache_dtype=quantization.kv_cache_dtype if quantization else None,
        )

    @property
    def num_layers(self) -> int:
        return len(self.order)

    @property
    def parameter_count(self) -> int:
        """Parameters of the checkpoint: tied embeddings once, no padding, nothing made later."""
        per_kind = Counter(self.order)
        tensors = [*self.first, *self.last, *(((self.head, 1),) if self.head else ())]
        total = _elements(tensors)
        return total + sum(
            number * _elements(self.kinds[kind].tensors) for kind, number in per_kind.items()
        )

    @property
    def num_kv_heads(self) -> int:
        """Of the layer with the most; 0 where nothing grows with the context."""
        caches = [cache for kind in self.kinds for cache in kind.caches]
        heads = [cache.num_heads for cache in caches if isinstance(cache, KeysAndValues)]
        return max(heads, default=1 if any(isinstance(c, Latent) for c in caches) else 0)

    def split_problem(self, degree: int) -> str:
        """Why a tensor-parallel degree is impossible; empty when it is possible."""
        for what, count in self.divisors:
            if count % degree:
                return f"it does not divide the {count} {what}"
        heads = self.num_kv_heads
        if heads and heads % degree and degree % heads:
            return f"it and {heads} key-value heads do not divide each other"
        return ""

    def learned_of(self, kind: LoadKind) -> Residuals | None:
        """What loads of this kind took; None where there was none."""
        return next((found for found in self.learned if found.kind == kind), None)

    @property
    def is_latent(self) -> bool:
        """Whether its attention caches compressed vectors."""
        return any(kind.unpacking is not None for kind in self.kinds)

    @property
    def has_state(self) -> bool:
        """Whether some layers keep a state of one size instead of keys and values."""
        return any(isinstance(cache, State) for kind in self.kinds for cache in kind.caches)


def _elements(tensors: Iterable[tuple[Tensor, int]]) -> int:
    return sum(number * tensor.elements for tensor, number in tensors if tensor.in_checkpoint)


def _architecture(read: ConfigReader) -> tuple[str, Builder]:
    names = read.texts("architectures")
    if not names:
        raise UnknownArchitecture("(none)", "config.json has no architectures.")
    for name in names:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    raise UnknownArchitecture(
        names[0][:100],
        "what its layers are made of is not in our table (vram/architectures.py); known are "
        f"{', '.join(sorted(ARCHITECTURES))}.",
    )


def _dtype(read: ConfigReader) -> str:
    """The outer config's, or that of the language model inside.

    Where neither says (gpt-oss), engines serve 16 bits.
    """
    outer = read.text("dtype", "torch_dtype", default="")
    if not outer and read.has("text_config"):
        outer = read.section("text_config").text("dtype", "torch_dtype", default="")
    return canonical_dtype(outer or "bfloat16")


def _quantization(read: ConfigReader) -> Quantization | None:
    for section in (read, *([read.section("text_config")] if read.has("text_config") else [])):
        found = Quantization.from_config(section.table("quantization_config"))
        if found is not None:
            return found
    return None


def _packer(quantization: Quantization | None) -> Callable[[Tensor, str], Tensor]:
    def pack(tensor: Tensor, prefix: str) -> Tensor:
        packing: Packing | None = None
        if quantization is not None and tensor.in_checkpoint:
            packing = quantization.packing(tensor, prefix)
        return replace(tensor, packing=packing, modules=())

    return pack


def _blocks(
    body: Body, quantization: Quantization | None
) -> tuple[tuple[Block, ...], tuple[int, ...]]:
    """The kinds of layers; one kind becomes two where only some of its layers are quantised."""
    pack = _packer(quantization)
    kinds: dict[tuple[int, tuple[Packing | None, ...]], int] = {}
    blocks: list[Block] = []
    order = []
    if quantization is not None:
        quantization.check(len(body.layers))
    for index, layer in enumerate(body.layers):
        prefix = f"{body.layer_prefix}{index}."
        packings: tuple[Packing | None, ...] = ()
        if quantization is not None and quantization.by_name:
            packings = tuple(quantization.packing(tensor, prefix) for tensor in layer.tensors)
        key = (id(layer), packings)
        if key not in kinds:
            kinds[key] = len(blocks)
            blocks.append(_block(layer, [pack(tensor, prefix) for tensor in layer.tensors]))
        order.append(kinds[key])
    return tuple(blocks), tuple(order)


def _block(layer: Layer, tensors: list[Tensor]) -> Block:
    return Block(
        tensors=_counted(tensors),
        caches=layer.caches,
        widths=layer.widths,
        routing=layer.routing,
        unpacking=layer.unpacking,
        biased_queries=layer.biased_queries,
    )


def _counted(tensors: Iterable[Tensor]) -> Tensors:
    return tuple(Counter(tensors).items())
