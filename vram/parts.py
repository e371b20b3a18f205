"""The pieces that a model is made of: tensors, layers, and what a layer remembers of a sequence.

Values only. The families build them from a config.json; weights and cache are computed from them.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from vram.errors import Invalid
from vram.units import ceil_div

Kind = Literal["linear", "expert", "embedding", "head", "plain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A side of a matrix, in `units` pieces that are not cut: heads, groups or single rows.

    With more GPUs than units each GPU holds one whole unit; with one unit nothing is split.
    """

    size: int
    units: int = 1

    def on(self, degree: int) -> int:
        """What one of `degree` GPUs holds."""
        return self.size if self.units == 1 else ceil_div(self.units, degree) * self.unit_size

    @property
    def unit_size(self) -> int:
        return self.size // self.units


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How many bits a quantised matrix takes, its scales and zero points included."""

    method: str
    weight_bits: int
    scale_bits: int = 0  # of each group: scale and zero point
    group_rows: int = 1  # 0: one group over all rows
    group_columns: int = 0  # 0: one group over all columns
    column_bits: int = 0  # of each column: GPTQ's order of the activations

    def side_bits(self, rows: int, columns: int) -> int:
        """Scales, zero points and orders: tensors beside the packed one."""
        row_groups = ceil_div(rows, self.group_rows) if self.group_rows else 1
        column_groups = ceil_div(columns, self.group_columns) if self.group_columns else 1
        return row_groups * column_groups * self.scale_bits + columns * self.column_bits

    def bits_per_weight(self, rows: int, columns: int) -> float:
        return self.weight_bits + self.side_bits(rows, columns) / (rows * columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """`copies` equal matrices as an engine lays them out: query, key and value fused into one."""

    kind: Kind
    modules: tuple[str, ...]  # where the checkpoint keeps it, from its layer on
    rows: tuple[Part, ...]
    columns: Part = Part(size=1)
    copies: int = 1  # experts
    is_float32: bool = False  # whatever the model's dtype is
    in_checkpoint: bool = True  # False: the engine makes it while loading
    packing: Packing | None = None

    @property
    def elements(self) -> int:
        return self.copies * sum(part.size for part in self.rows) * self.columns.size


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysAndValues:
    """A cache that grows with the context; a window keeps only its last tokens."""

    num_heads: int
    key_size: int
    value_size: int
    query_heads: int  # that read it
    window_tokens: int | None = None

    def elements(self, degree: int) -> int:
        """Per token on one GPU. More GPUs than heads: each keeps one whole head."""
        return ceil_div(self.num_heads, degree) * (self.key_size + self.value_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Multi-head latent attention: one compressed vector per token, whole on every GPU."""

    size: int
    value_size: int  # the part of it that is also the value
    query_heads: int

    def elements(self, degree: int) -> int:
        return self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossKeysAndValues:
    """Keys and values of an encoder's output: as many tokens as the encoder makes."""

    num_heads: int
    head_dim: int
    encoder_tokens: int

    def elements(self, degree: int) -> int:
        return ceil_div(self.num_heads, degree) * 2 * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A state-space layer's memory: of one size however long the sequence is."""

    convolution: tuple[Part, ...]
    convolution_tokens: int
    recurrent: Part
    is_float32: bool = False  # the recurrent part; the convolution follows the model

    def convolution_elements(self, degree: int) -> int:
        return sum(part.on(degree) for part in self.convolution) * self.convolution_tokens

    def recurrent_elements(self, degree: int) -> int:
        return self.recurrent.on(degree)


Cache = KeysAndValues | Latent | CrossKeysAndValues | State


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """Elements per token that live at once at one point of a layer."""

    split: tuple[Part, ...] = ()
    whole: int = 0

    def on(self, degree: int) -> int:
        return sum(part.on(degree) for part in self.split) + self.whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How tokens pass through experts, for the buffers that they need on the way."""

    experts_per_token: int
    rows: Part  # the intermediate side of one expert
    input_size: int
    is_gated: bool

    def projected(self, degree: int) -> int:
        """Gate and up, or up alone."""
        return self.rows.on(degree) * (2 if self.is_gated else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacking:
    """Latent attention's keys and values of cached tokens, made whole again, and what is beside."""

    rows: Part
    beside: Width


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One block of a model, or a part of one."""

    tensors: tuple[Tensor, ...] = ()
    caches: tuple[Cache, ...] = ()
    widths: tuple[Width, ...] = ()
    # What a tensor-parallel degree has to divide, by name.
    divisors: tuple[tuple[str, int], ...] = ()
    query_rows: int = 0  # what its attention hands on
    biased_queries: bool = False
    routing: Routing | None = None
    unpacking: Unpacking | None = None


def joined(*parts: Layer) -> Layer:
    """The parts of a block as one."""
    return Layer(
        tensors=tuple(tensor for part in parts for tensor in part.tensors),
        caches=tuple(cache for part in parts for cache in part.caches),
        widths=tuple(width for part in parts for width in part.widths),
        divisors=tuple(dict.fromkeys(divisor for part in parts for divisor in part.divisors)),
        query_rows=max((part.query_rows for part in parts), default=0),
        biased_queries=any(part.biased_queries for part in parts),
        routing=next((part.routing for part in parts if part.routing), None),
        unpacking=next((part.unpacking for part in parts if part.unpacking), None),
    )


def prefixed(layer: Layer, prefix: str) -> Layer:
    """The same with its modules below another name."""
    return replace(
        layer,
        tensors=tuple(
            replace(tensor, modules=tuple(f"{prefix}{module}" for module in tensor.modules))
            for tensor in layer.tensors
        ),
    )


def even(size: int) -> Part:
    """A side that is split row by row."""
    return Part(size=size, units=size)


def heads(count: int, head_dim: int) -> Part:
    """A side made of whole heads."""
    return Part(size=count * head_dim, units=count)


def vector(module: str, *parts: Part, is_float32: bool = False) -> Tensor:
    """A bias or a norm."""
    return Tensor(kind="plain", modules=(module,), rows=parts, is_float32=is_float32)


def array(module: str, *sizes: int) -> Tensor:
    """A plain tensor of any shape that every GPU holds whole."""
    return Tensor(kind="plain", modules=(module,), rows=(Part(size=prod(sizes)),))


def whole(size: int) -> Part:
    """A side that is not split."""
    if size < 1:
        raise Invalid(f"config.json: a side of a matrix is {size}", "model")
    return Part(size=size)
