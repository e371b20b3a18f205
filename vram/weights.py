"""The weight tensors that one GPU holds, as the engine lays them out, and their bytes.

vLLM fuses query, key and value into one tensor, gate and up into another, and all experts of a
layer into two. The layout matters: the allocator rounds each big tensor up, 0.1 GiB in a 7B model.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from vram.dtypes import dtype_bytes
from vram.model import Experts, ModelShape
from vram.quantization import Quantization, named
from vram.settings import EngineSettings
from vram.units import MIB, ceil_div, round_up

# vLLM pads the vocabulary so that every GPU's share is whole
# (model_executor/layers/vocab_parallel_embedding.py, DEFAULT_VOCAB_PADDING_SIZE).
VOCABULARY_PADDING = 64

# torch's caching allocator takes memory in pieces of 2 MiB and does not split a block above
# 20 MiB (vLLM: gpu_worker.py, _scoped_allocator_max_split). Seen: Qwen2.5-7B measures 14.29 GiB
# for 14.18 GiB of parameters, Llama-3.1-8B (all tensors whole) 15.0 for 14.96; H200, vLLM 0.26.
ALLOCATOR_PIECE_BYTES = 2 * MIB
ALLOCATOR_ROUNDS_ABOVE_BYTES = 20 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """`copies` equal tensors of one kind on one GPU."""

    kind: Literal["linear", "expert", "plain"]
    elements: int
    copies: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The layers that one GPU of a pipeline holds."""

    num_layers: int
    num_expert_layers: int
    is_first: bool
    is_last: bool


def weight_bytes(shape: ModelShape, settings: EngineSettings, *, rounded: bool) -> int:
    """Bytes on the fullest GPU; `rounded` as a CUDA allocator takes them."""
    quantization = effective_quantization(shape, settings)
    plain_bits = 8 * dtype_bytes(settings.dtype)
    return max(
        sum(
            tensor.copies * _tensor_bytes(tensor, plain_bits, quantization, rounded)
            for tensor in tensors(shape, settings.tensor_parallel_size, stage)
        )
        + _rope_bytes(shape, settings)
        for stage in stages(shape, settings.pipeline_parallel_size)
    )


def effective_quantization(shape: ModelShape, settings: EngineSettings) -> Quantization | None:
    """The checkpoint's own format if it has one; else what the engine is asked to make of it."""
    if shape.quantization is not None:
        return shape.quantization
    return named(settings.quantization) if settings.quantization else None


def parameter_count(shape: ModelShape) -> int:
    """Parameters of the checkpoint: tied embeddings once, no padding."""
    whole = Stage(
        num_layers=shape.num_layers,
        num_expert_layers=shape.experts.num_layers if shape.experts else 0,
        is_first=True,
        is_last=True,
    )
    return sum(t.copies * t.elements for t in tensors(shape, 1, whole, vocabulary_padding=1))


def stages(shape: ModelShape, pipeline_parallel_size: int) -> tuple[Stage, ...]:
    """vLLM's split of the layers: the rest goes to the later stages, but not to the last."""
    layers = layers_per_stage(shape.num_layers, pipeline_parallel_size)
    num_expert_layers = shape.experts.num_layers if shape.experts else 0
    return tuple(
        Stage(
            num_layers=num_layers,
            num_expert_layers=min(num_layers, num_expert_layers),  # the heavier kind, if mixed
            is_first=index == 0,
            is_last=index == pipeline_parallel_size - 1,
        )
        for index, num_layers in enumerate(layers)
    )


def layers_per_stage(num_layers: int, pipeline_parallel_size: int) -> list[int]:
    """distributed/utils.py::get_pp_indices of vLLM 0.29, as counts."""
    layers = [num_layers // pipeline_parallel_size] * pipeline_parallel_size
    for index in range(2, num_layers % pipeline_parallel_size + 2):
        layers[-index] += 1
    return layers


def tensors(
    shape: ModelShape,
    tensor_parallel_size: int,
    stage: Stage,
    vocabulary_padding: int = VOCABULARY_PADDING,
) -> list[Tensor]:
    """Everything one GPU of a stage holds, in shares of a whole model."""
    degree = tensor_parallel_size
    vocabulary_rows = round_up(shape.vocab_size, vocabulary_padding)
    vocabulary = Tensor(
        kind="plain", elements=ceil_div(vocabulary_rows, degree) * shape.hidden_size
    )
    held = [*_attention(shape, degree, stage.num_layers)]
    num_dense_layers = stage.num_layers - stage.num_expert_layers
    held += _mlp(shape, degree, shape.intermediate_size, num_dense_layers)
    if shape.experts:
        held += _expert_layers(shape, shape.experts, degree, stage.num_expert_layers)
    held.append(
        Tensor(
            kind="plain",
            elements=shape.hidden_size,
            copies=shape.norms_per_layer * stage.num_layers + stage.is_last,
        )
    )
    if stage.is_first:
        held.append(vocabulary)
    # Tied, the last stage uses the embedding as the head; it needs a copy if it is not the first.
    if stage.is_last and not (shape.tied_embeddings and stage.is_first):
        held.append(vocabulary)
    return held


def _attention(shape: ModelShape, degree: int, num_layers: int) -> list[Tensor]:
    query_rows = ceil_div(shape.num_heads, degree) * shape.head_dim
    # More GPUs than key-value heads: each holds one whole head.
    kv_rows = ceil_div(shape.num_kv_heads, degree) * shape.head_dim
    qkv_rows = query_rows + 2 * kv_rows
    held = [
        Tensor(kind="linear", elements=qkv_rows * shape.hidden_size, copies=num_layers),
        Tensor(kind="linear", elements=query_rows * shape.hidden_size, copies=num_layers),
    ]
    if shape.qkv_bias:
        held.append(Tensor(kind="plain", elements=qkv_rows, copies=num_layers))
    if shape.output_bias:
        held.append(Tensor(kind="plain", elements=shape.hidden_size, copies=num_layers))
    if shape.qk_norm:
        held.append(Tensor(kind="plain", elements=shape.head_dim, copies=2 * num_layers))
    return held


def _mlp(shape: ModelShape, degree: int, intermediate_size: int, num_layers: int) -> list[Tensor]:
    rows = ceil_div(intermediate_size, degree)
    fused = 2 if shape.gated_mlp else 1  # gate and up in one tensor
    held = [
        Tensor(kind="linear", elements=fused * rows * shape.hidden_size, copies=num_layers),
        Tensor(kind="linear", elements=rows * shape.hidden_size, copies=num_layers),
    ]
    if shape.mlp_bias:
        held.append(
            Tensor(kind="plain", elements=fused * rows + shape.hidden_size, copies=num_layers)
        )
    return held


def _expert_layers(
    shape: ModelShape, experts: Experts, degree: int, num_layers: int
) -> list[Tensor]:
    rows = ceil_div(experts.intermediate_size, degree)
    router = Tensor(
        kind="plain", elements=experts.num_experts * shape.hidden_size, copies=num_layers
    )
    gate_and_up = Tensor(
        kind="expert",
        elements=2 * experts.num_experts * rows * shape.hidden_size,
        copies=num_layers,
    )
    down = Tensor(
        kind="expert", elements=experts.num_experts * rows * shape.hidden_size, copies=num_layers
    )
    held = [router, gate_and_up, down]
    if experts.shared_intermediate_size:
        held += _mlp(shape, degree, experts.shared_intermediate_size, num_layers)
        held.append(Tensor(kind="plain", elements=shape.hidden_size, copies=num_layers))  # its gate
    return held


def _tensor_bytes(
    tensor: Tensor, plain_bits: int, quantization: Quantization | None, rounded: bool
) -> int:
    reached = quantization is not None and (
        tensor.kind == "expert" or (tensor.kind == "linear" and quantization.reach == "linear")
    )
    bits = quantization.bits_per_weight if quantization and reached else plain_bits
    size = ceil(tensor.elements * bits / 8)
    if rounded and size > ALLOCATOR_ROUNDS_ABOVE_BYTES:
        return round_up(size, ALLOCATOR_PIECE_BYTES)
    return size


def _rope_bytes(shape: ModelShape, settings: EngineSettings) -> int:
    """The table of rotary positions, one for all layers."""
    return (
        shape.max_context_tokens
        * shape.head_dim  # half of it cosines, half sines
        * dtype_bytes(settings.dtype)
    )
