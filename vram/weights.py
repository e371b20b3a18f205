"""The weight tensors that one GPU holds, as the engine lays them out, and their bytes.

vLLM fuses query, key and value into one tensor, gate and up into another, and all experts of a
layer into two. The layout matters: the allocator rounds each big tensor up, 0.1 GiB in a 7B model.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from vram.dtypes import dtype_bytes
from vram.model import Block, ModelShape, Tensors
from vram.parts import Packing, Tensor
from vram.quantization import named
from vram.settings import EngineSettings
from vram.units import MIB, ceil_div, round_up

# vLLM pads the vocabulary so that every GPU's share is whole
# (model_executor/layers/vocab_parallel_embedding.py, DEFAULT_VOCAB_PADDING_SIZE).
VOCABULARY_PADDING = 64

# torch's caching allocator (CUDACachingAllocator.cpp) takes 10 MiB and more in pieces of 2 MiB.
# It gives back what is left of a piece if that is more than 1 MiB and the block not above 20 MiB
# (vLLM: gpu_worker.py, _scoped_allocator_max_split). Seen: Qwen2.5-7B measures 14.29 GiB for 14.18
# GiB of parameters, Llama-3.1-8B (all tensors whole) 15.00 for 14.96; H200, vLLM 0.26.
ALLOCATOR_PIECE_BYTES = 2 * MIB
ALLOCATOR_ROUNDS_FROM_BYTES = 10 * MIB
ALLOCATOR_SPLITS_BELOW_BYTES = 20 * MIB
ALLOCATOR_LEAST_REMAINDER_BYTES = MIB
LAYERS_UNTIL_STEADY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The layers that one GPU of a pipeline holds."""

    layers: tuple[int, ...]  # kinds, in order
    is_first: bool
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a model is spread, and in which formats."""

    degree: int
    expert_degree: int  # above 1: whole experts are handed out instead of slices of all
    plain_bits: int
    online: Packing | None  # what the engine makes of a plain checkpoint while it loads
    rounded: bool  # as a CUDA allocator takes them


def weight_bytes(shape: ModelShape, settings: EngineSettings, *, rounded: bool) -> int:
    """Bytes on the fullest GPU."""
    split = split_of(shape, settings, rounded=rounded)
    return max(
        stage_bytes(shape, stage, split) for stage in stages(shape, settings.pipeline_parallel_size)
    )


def split_of(shape: ModelShape, settings: EngineSettings, *, rounded: bool) -> Split:
    """The settings as far as weights go."""
    degree = settings.tensor_parallel_size
    online = settings.quantization if shape.quantization is None else None
    return Split(
        degree=degree,
        expert_degree=degree if settings.expert_parallel else 1,
        plain_bits=8 * dtype_bytes(settings.dtype),
        online=named(online) if online else None,
        rounded=rounded,
    )


def stage_bytes(shape: ModelShape, stage: Stage, split: Split) -> int:
    """One pipeline stage on one of its GPUs."""
    total = sum(
        number
        * (_tensors_bytes(shape.kinds[kind].tensors, split) + _waste(shape.kinds[kind], split))
        for kind, number in Counter(stage.layers).items()
    )
    if stage.is_first:
        total += _tensors_bytes(shape.first, split)
    if stage.is_last:
        total += _tensors_bytes(shape.last, split)
        if shape.head is not None:
            total += _tensor_bytes(shape.head, split)
        elif shape.generates and not stage.is_first:
            # Tied, the last stage uses the embedding as the head, and needs a copy of it.
            total += _tensors_bytes(_embeddings(shape.first), split)
    rope_bytes = shape.rope_elements * split.plain_bits // 8  # a table of positions for all layers
    return int(total * shape.checkpoint_ratio) + rope_bytes


def stages(shape: ModelShape, pipeline_parallel_size: int) -> tuple[Stage, ...]:
    """vLLM's split of the layers: the rest goes to the later stages, but not to the last."""
    found = []
    start = 0
    for index, num_layers in enumerate(layers_per_stage(shape.num_layers, pipeline_parallel_size)):
        found.append(
            Stage(
                layers=shape.order[start : start + num_layers],
                is_first=index == 0,
                is_last=index == pipeline_parallel_size - 1,
            )
        )
        start += num_layers
    return tuple(found)


def layers_per_stage(num_layers: int, pipeline_parallel_size: int) -> list[int]:
    """distributed/utils.py::get_pp_indices of vLLM 0.29, as counts."""
    layers = [num_layers // pipeline_parallel_size] * pipeline_parallel_size
    for index in range(2, num_layers % pipeline_parallel_size + 2):
        layers[-index] += 1
    return layers


def checkpoint_bits(shape: ModelShape) -> int:
    """The checkpoint's own size in bits, whole and unpadded, by the config."""
    split = Split(
        degree=1,
        expert_degree=1,
        plain_bits=8 * dtype_bytes(shape.dtype),
        online=None,
        rounded=False,
    )
    head: Tensors = ((shape.head, 1),) if shape.head is not None else ()
    parts = [(shape.first, 1), (shape.last, 1), (head, 1)]
    parts += [(shape.kinds[kind].tensors, number) for kind, number in Counter(shape.order).items()]
    return sum(
        times
        * count
        * tensor.copies
        * sum(_bits(tensor, _rows(tensor, 1), tensor.columns.size, split))
        for tensors, times in parts
        for tensor, count in tensors
        if tensor.in_checkpoint
    )


def _tensors_bytes(tensors: Tensors, split: Split) -> int:
    return sum(count * _tensor_bytes(tensor, split) for tensor, count in tensors)


def _tensor_bytes(tensor: Tensor, split: Split) -> int:
    degree, copies = split.degree, tensor.copies
    if tensor.kind == "expert" and split.expert_degree > 1:
        degree, copies = 1, ceil_div(copies, split.expert_degree)
    rows = _rows(tensor, degree)
    if tensor.kind in ("embedding", "head"):
        rows = ceil_div(round_up(tensor.rows[0].size, VOCABULARY_PADDING), degree)
    weight_bits, side_bits = _bits(tensor, rows, tensor.columns.on(degree), split)
    size = ceil_div(copies * weight_bits, 8)
    if split.rounded:
        size = _allocated(size)
    return size + ceil_div(copies * side_bits, 8)


def _allocated(size_bytes: int) -> int:
    """The block that a CUDA allocator takes for a tensor."""
    if size_bytes < ALLOCATOR_ROUNDS_FROM_BYTES:
        return size_bytes  # cut from shared blocks
    rounded = round_up(size_bytes, ALLOCATOR_PIECE_BYTES)
    is_split = rounded - size_bytes > ALLOCATOR_LEAST_REMAINDER_BYTES
    return size_bytes if is_split and size_bytes < ALLOCATOR_SPLITS_BELOW_BYTES else rounded


def _waste(kind: Block, split: Split) -> int:
    """What one layer wastes when it is packed while it loads: its blocks were others' before.

    torch's allocator hands out a free block that is up to 20 MiB too large and does not split it:
    20 MiB for each layer of Qwen2.5-14B in fp8, 3 for Qwen2.5-7B. H200, vLLM 0.26.
    """
    if split.online is None or not split.rounded:
        return 0
    free: list[int] = []
    waste = 0
    for _ in range(LAYERS_UNTIL_STEADY):
        waste = 0
        for tensor, _count in kind.tensors:
            if tensor.kind not in ("linear", "expert") or tensor.packing is not None:
                continue
            plain = _block(free, _tensor_bytes(tensor, replace(split, online=None, rounded=False)))
            wanted = _tensor_bytes(tensor, replace(split, rounded=False))
            waste += _block(free, wanted) - _tensor_bytes(tensor, split)
            free.append(plain)
    return max(waste, 0)


def _block(free: list[int], wanted: int) -> int:
    """The block that a request gets: the best free one, or a new one."""
    rounded = round_up(wanted, ALLOCATOR_PIECE_BYTES)
    if wanted <= ALLOCATOR_SPLITS_BELOW_BYTES:
        return _allocated(wanted)
    fitting = [size for size in free if rounded <= size < rounded + ALLOCATOR_SPLITS_BELOW_BYTES]
    if not fitting:
        return rounded
    best = min(fitting)
    free.remove(best)
    return best


def _rows(tensor: Tensor, degree: int) -> int:
    return sum(part.on(degree) for part in tensor.rows)


def _bits(tensor: Tensor, rows: int, columns: int, split: Split) -> tuple[int, int]:
    """Of the weights, and of what lies beside them; of one copy."""
    packing = tensor.packing
    if packing is None and tensor.kind in ("linear", "expert"):
        packing = split.online
    if packing is not None:
        return rows * columns * packing.weight_bits, packing.side_bits(rows, columns)
    return rows * columns * (32 if tensor.is_float32 else split.plain_bits), 0


def _embeddings(tensors: Iterable[tuple[Tensor, int]]) -> Tensors:
    return tuple((tensor, count) for tensor, count in tensors if tensor.kind == "embedding")
