import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from vram.checkpoint import (
    LARGEST_HEADER_BYTES,
    LARGEST_INDEX_BYTES,
    Checkpoint,
    StoredTensor,
    read_folder,
    read_header,
    read_index,
    with_checkpoint,
)
from vram.errors import Invalid
from vram.hub_files import checkpoint_on_hub
from vram.model import ModelShape
from vram.weights import weight_bytes

GB2 = struct.pack("<Q", 2 << 30)


def _entry(dtype: str, *sizes: int, start: int = 0) -> dict[str, object]:
    size_bytes = {"BF16": 2, "F32": 4, "I32": 4, "F8_E4M3": 1}[dtype]
    for size in sizes:
        size_bytes *= size
    return {"dtype": dtype, "shape": list(sizes), "data_offsets": [start, start + size_bytes]}


def _file(header: object) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def _reader(content: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, count: content[offset : offset + count]


def test_a_folder_is_the_sum_of_its_headers(tmp_path: Path) -> None:
    first = {"__metadata__": {"format": "pt"}, "a": _entry("BF16", 4, 8)}
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(_file(first))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(_file({"b": _entry("F32", 3)}))
    found = read_folder(tmp_path)
    assert found is not None
    assert found.total_bytes == 4 * 8 * 2 + 3 * 4
    assert [tensor.name for tensor in found.tensors] == ["a", "b"]
    assert read_folder(tmp_path / "nothing") is None


def test_a_header_of_two_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(GB2 + b"{" * 100)
    with pytest.raises(Invalid, match=f"2147483648 bytes; at most {LARGEST_HEADER_BYTES}"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a safetensors file"),
        (b"1234", "not a safetensors file"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (struct.pack("<Q", 3) + b"{,}", "not JSON"),
        (_file([1]), "not an object"),
        (_file({"a": 1}), "no tensor"),
        (_file({"a": _entry("BF16", 2) | {"dtype": "F3"}}), "unknown dtype"),
        (_file({"a": _entry("BF16", 2) | {"shape": [-2]}}), "no shape"),
        (_file({"a": _entry("BF16", 2) | {"shape": [10**40]}}), "no shape"),
        (_file({"a": _entry("BF16", 2) | {"data_offsets": [0]}}), "no place"),
        (_file({"a": _entry("BF16", 2) | {"data_offsets": [0, 5]}}), "not the size"),
    ],
)
def test_a_damaged_header_is_one_clear_error(content: bytes, said: str) -> None:
    with pytest.raises(Invalid, match=said) as caught:
        read_header(_reader(content), "x.safetensors")
    assert len(str(caught.value)) < 300


def test_an_index_states_the_sum() -> None:
    index = {"metadata": {"total_size": 15_231_233_024}, "weight_map": {"a": "b"}}
    assert read_index(json.dumps(index).encode(), "index").total_bytes == 15_231_233_024


@pytest.mark.parametrize("metadata", [None, {}, {"total_size": -1}, {"total_size": "x"}, 4])
def test_an_index_without_a_sum_is_refused(metadata: object) -> None:
    with pytest.raises(Invalid, match="total_size"):
        read_index(json.dumps({"metadata": metadata}).encode(), "index")


def _stored(shape: ModelShape, *more: StoredTensor) -> Checkpoint:
    """A checkpoint with as many 16-bit elements as the config implies, and some more."""
    whole = StoredTensor(
        "model.layers.0.everything", "BF16", shape.parameter_count, 2 * shape.parameter_count
    )
    return Checkpoint(
        total_bytes=whole.size_bytes + sum(t.size_bytes for t in more), tensors=(whole, *more)
    )


def test_what_the_engine_does_not_load_is_not_counted(shape_of, settings_with) -> None:
    shape = shape_of("qwen2.5-0.5b")  # tied, 24 layers
    extra = (
        StoredTensor("lm_head.weight", "BF16", 10**8, 2 * 10**8),
        StoredTensor("model.layers.24.mtp_block", "BF16", 10**8, 2 * 10**8),
        StoredTensor("mtp.fc", "BF16", 10**8, 2 * 10**8),
    )
    assert with_checkpoint(shape, _stored(shape, *extra)).checkpoint_ratio == pytest.approx(1.0)


def test_headers_decide_over_the_config(shape_of, settings_with) -> None:
    shape = shape_of("qwen2.5-7b")
    more = StoredTensor("model.layers.1.adapter", "BF16", shape.parameter_count // 10, 0)
    heavier = with_checkpoint(shape, _stored(shape, more))
    before = weight_bytes(shape, settings_with(), rounded=False)
    after = weight_bytes(heavier, settings_with(), rounded=False)
    assert after == pytest.approx(1.1 * before, rel=0.001)


def test_a_checkpoint_in_32_bits_is_served_in_16(shape_of, settings_with) -> None:
    shape = shape_of("qwen2.5-0.5b")
    tensor = StoredTensor("w", "F32", shape.parameter_count, 4 * shape.parameter_count)
    stored = Checkpoint(total_bytes=tensor.size_bytes, tensors=(tensor,))
    assert with_checkpoint(shape, stored).checkpoint_ratio == pytest.approx(1.0)


def test_files_of_another_model_are_refused(shape_of) -> None:
    with pytest.raises(Invalid, match="not of one model"):
        with_checkpoint(shape_of("qwen2.5-7b"), Checkpoint(total_bytes=10**9))


class _Hub:
    """A repository's files, and what was asked of them."""

    def __init__(self, **files: bytes) -> None:
        self.files = {name.replace("__", "."): content for name, content in files.items()}
        self.asked: list[int] = []

    def __call__(self, name: str, offset: int, count: int) -> bytes | None:
        self.asked.append(count)
        content = self.files.get(name)
        return None if content is None else content[offset : offset + count]


def test_on_the_hub_only_the_header_of_a_single_file_is_asked_for() -> None:
    content = _file({"a": _entry("BF16", 1000, 1000)})
    hub = _Hub(model__safetensors=content + b"\0" * 2_000_000)
    found = checkpoint_on_hub("owner/model", hub)
    assert found is not None
    assert found.total_bytes == 2_000_000
    assert sum(hub.asked[1:]) < 1000


def test_on_the_hub_an_index_is_enough() -> None:
    index = json.dumps({"metadata": {"total_size": 123}}).encode()
    found = checkpoint_on_hub("owner/model", _Hub(model__safetensors__index__json=index))
    assert found == Checkpoint(total_bytes=123)
    assert checkpoint_on_hub("owner/model", _Hub()) is None


def test_on_the_hub_hostile_files_are_refused_unread() -> None:
    hub = _Hub(model__safetensors=GB2)
    with pytest.raises(Invalid, match="header"):
        checkpoint_on_hub("owner/model", hub)
    assert max(hub.asked[1:]) == 8
    huge = _Hub(model__safetensors__index__json=b" " * (LARGEST_INDEX_BYTES + 10))
    with pytest.raises(Invalid, match="not read"):
        checkpoint_on_hub("owner/model", huge)


def _written(folder: Path, *names: str, index: object = None) -> Path:
    """Files of one tensor of 64 bytes each."""
    for name in names:
        (folder / name).write_bytes(_file({name: _entry("BF16", 4, 8)}))
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


TWO = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX_OF_TWO = {"metadata": {"total_size": 128}, "weight_map": {"a": TWO[0], "b": TWO[1]}}


@pytest.mark.parametrize(
    ("names", "index", "total_bytes", "has_headers"),
    [
        ((*TWO, "consolidated.safetensors"), INDEX_OF_TWO, 128, True),  # as Mistral's are stored
        ((*TWO, "consolidated.safetensors"), None, 128, True),
        (("model.safetensors", "consolidated.safetensors"), None, 64, True),
        (("model.safetensors", "adapter_model.safetensors"), None, 64, True),
        (("consolidated.safetensors",), None, 64, True),
        (TWO[:1], INDEX_OF_TWO, 128, False),  # a download that was cut off
        ((), INDEX_OF_TWO, 128, False),
    ],
)
def test_a_model_is_counted_once_and_whole(
    tmp_path: Path, names: tuple[str, ...], index: object, total_bytes: int, has_headers: bool
) -> None:
    found = read_folder(_written(tmp_path, *names, index=index))
    assert found is not None
    assert (found.total_bytes, bool(found.tensors)) == (total_bytes, has_headers)


def test_shards_of_which_some_are_missing_say_nothing_without_an_index(tmp_path: Path) -> None:
    assert read_folder(_written(tmp_path, TWO[1])) is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_in_a_folder_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(Invalid, match=r"model\.safetensors\.index\.json"):
        read_folder(tmp_path)
