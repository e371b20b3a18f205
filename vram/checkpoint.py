"""What a checkpoint's files say they hold: their headers and their index. Reads no weights.

A header is written by whoever made the file: its length is checked before a byte of it is read.
"""

import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from vram.dtypes import dtype_bytes
from vram.errors import Invalid
from vram.json_file import parsed, read_bounded
from vram.model import ModelShape
from vram.units import MIB, gib
from vram.weights import checkpoint_bits

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# A shard of DeepSeek-V3 has 90 kB, a whole model in one file some MB.
LARGEST_HEADER_BYTES = 8 * MIB
# Kimi-K2's index, one line for each of 385 experts x 61 layers, is 9 MB.
LARGEST_INDEX_BYTES = 16 * MIB
MOST_FILES = 4096
LENGTH_BYTES = 8

DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8,
    "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
}  # fmt: skip
PLAIN = frozenset({"F64", "F32", "F16", "BF16"})

# Prediction layers are not loaded unless they draft, and engines make these buffers themselves.
NOT_LOADED = re.compile(r"(^|\.)mtp\.|rotary_emb\.inv_freq$|position_ids$")
LAYER = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.")

SHARD = re.compile(r"-of-(\d{1,6})\.safetensors$")

# Headers and config of one model agree to some percent; beyond, they are not one model's.
LOWEST_RATIO, HIGHEST_RATIO = 0.5, 2.0

ReadSome = Callable[[int, int], bytes]  # (offset, count) -> that part of a file, or less at its end


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    name: str
    dtype: str
    elements: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """All that is known of a checkpoint's tensors; without headers only their sum."""

    total_bytes: int
    tensors: tuple[StoredTensor, ...] = ()


def read_folder(folder: Path) -> Checkpoint | None:
    """From the headers of a local folder; None where there are none of the whole model.

    Of a model that is stored twice, as Mistral's are, one is read. Where files of it are missing,
    as after a download that was cut off, only what the index states is known.
    """
    index = _index_of(folder)
    paths = _paths_of_one_model(folder, index)
    if paths is None:
        return read_index(index, INDEX) if index is not None else None
    tensors: list[StoredTensor] = []
    for path in paths:
        tensors += _header_of_file(path)
    if not tensors:
        return None
    return Checkpoint(
        total_bytes=sum(tensor.size_bytes for tensor in tensors), tensors=tuple(tensors)
    )


def _index_of(folder: Path) -> bytes | None:
    path = folder / INDEX
    return read_bounded(path, LARGEST_INDEX_BYTES) if path.is_file() else None


def _paths_of_one_model(folder: Path, index: bytes | None) -> list[Path] | None:
    """As engines choose them: what the index names, else the only file, else all shards.

    None where some are missing.
    """
    found = {path.name: path for path in sorted(folder.glob("*.safetensors"))[: MOST_FILES + 1]}
    if len(found) > MOST_FILES:
        raise Invalid(f"{folder} has more than {MOST_FILES} safetensors files", "model")
    if index is not None:
        files = parsed(index, INDEX).get("weight_map")
        if not isinstance(files, Mapping) or not all(isinstance(f, str) for f in files.values()):
            raise Invalid(f"{INDEX} has no weight_map", "model")
        named = sorted(set(files.values()))
        return [found[name] for name in named] if found.keys() >= set(named) else None
    if SINGLE in found:
        return [found[SINGLE]]
    shards = {name: shard for name in found if (shard := SHARD.search(name)) is not None}
    if any(len(shards) < int(shard[1]) for shard in shards.values()):
        return None
    return [found[name] for name in shards or found]


def read_header(read: ReadSome, name: str) -> list[StoredTensor]:
    """The tensors of one file, from its first bytes."""
    prefix = read(0, LENGTH_BYTES)
    if len(prefix) < LENGTH_BYTES:
        raise Invalid(f"{name} is not a safetensors file: it has {len(prefix)} bytes", "model")
    (length,) = struct.unpack("<Q", prefix)
    if length > LARGEST_HEADER_BYTES:
        raise Invalid(
            f"{name} announces a header of {length} bytes; at most {LARGEST_HEADER_BYTES} are read",
            "model",
        )
    text = read(LENGTH_BYTES, length)
    if len(text) < length:
        raise Invalid(f"{name} is truncated: its header has {len(text)} of {length} bytes", "model")
    return [
        _tensor(name, key, entry)
        for key, entry in parsed(text, name).items()
        if key != "__metadata__"
    ]


def read_index(text: bytes, name: str) -> Checkpoint:
    """The sum that an index states."""
    metadata = parsed(text, name).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    if isinstance(total, bool) or not isinstance(total, (int, float)) or not 0 < total < 1 << 50:
        raise Invalid(f"{name} has no metadata.total_size", "model")
    return Checkpoint(total_bytes=int(total))


def with_checkpoint(shape: ModelShape, checkpoint: Checkpoint) -> ModelShape:
    """The shape, its weights scaled to what the files really hold."""
    implied_bits = checkpoint_bits(shape)
    if checkpoint.tensors:
        found_bits = _loaded_bits(shape, checkpoint.tensors)
    else:
        found_bits = 8 * checkpoint.total_bytes  # with what is not loaded: only good as a check
    ratio = found_bits / implied_bits
    if not LOWEST_RATIO <= ratio <= HIGHEST_RATIO:
        raise Invalid(
            f"The safetensors hold {gib(found_bits // 8)} and config.json describes "
            f"{gib(implied_bits // 8)}: they are not of one model",
            "model",
        )
    return replace(shape, checkpoint_ratio=ratio) if checkpoint.tensors else shape


def _loaded_bits(shape: ModelShape, tensors: Iterable[StoredTensor]) -> int:
    plain_bits = 8 * dtype_bytes(shape.dtype)
    total = 0
    for tensor in tensors:
        if not _is_loaded(shape, tensor.name):
            continue
        # A checkpoint in 32 bits is served in its config's dtype; packed ones keep their scales.
        if shape.quantization is None and tensor.dtype in PLAIN:
            total += tensor.elements * plain_bits
        else:
            total += 8 * tensor.size_bytes
    return total


def _is_loaded(shape: ModelShape, name: str) -> bool:
    if NOT_LOADED.search(name):
        return False
    if shape.tied_embeddings and name.endswith("lm_head.weight"):
        return False
    layer = LAYER.match(name)
    return layer is None or int(layer[1]) < shape.num_layers


def _header_of_file(path: Path) -> list[StoredTensor]:
    try:
        with path.open("rb") as file:

            def read(offset: int, count: int) -> bytes:
                file.seek(offset)
                return file.read(count)

            return read_header(read, path.name)
    except OSError as error:
        raise Invalid(f"{path} cannot be read: {error.strerror}", "model") from error


def _tensor(file: str, name: str, entry: object) -> StoredTensor:
    if not isinstance(entry, Mapping):
        raise Invalid(f"{file}: {name[:60]!r} is no tensor", "model")
    dtype, sizes, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in DTYPE_BITS:
        raise Invalid(f"{file}: {name[:60]!r} is of an unknown dtype", "model")
    sides, place = _sizes(sizes), _sizes(offsets)
    if sides is None or place is None or len(place) != 2:
        raise Invalid(f"{file}: {name[:60]!r} has no shape or no place", "model")
    elements = prod(sides)
    size_bytes = elements * DTYPE_BITS[dtype] // 8
    if place[1] - place[0] != size_bytes:
        raise Invalid(f"{file}: {name[:60]!r} has not the size of its shape", "model")
    return StoredTensor(name, str(dtype), elements, size_bytes)


def _sizes(values: object) -> list[int] | None:
    if not isinstance(values, list) or len(values) > 8:
        return None
    sizes = [value for value in values if type(value) is int and 0 <= value < 1 << 50]
    return sizes if len(sizes) == len(values) else None
