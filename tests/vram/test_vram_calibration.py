"""The file of loads: whole lines, a bounded size, and nothing in it that can hurt."""

import fcntl
import json
import multiprocessing
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import vram.calibration
from vram.calibration import (
    Calibration,
    Load,
    append_load,
    calibration_path,
    read_calibration,
    shape_hash,
)
from vram.residuals import LoadKind
from vram.units import GIB

KIND = LoadKind(
    engine="vllm",
    card="H200",
    tensor_parallel_size=1,
    pipeline_parallel_size=1,
    form="bfloat16, plain, kv auto",
)
VERSIONS = {"vllm": "0.29.0"}


def load(load_id: str = "a", **changes: object) -> Load:
    made = Load(
        load_id=load_id,
        at_s=1.0,
        architecture="Qwen2ForCausalLM",
        shape="0123",
        engine_version="0.29.0",
        kind=KIND,
        estimated={"weights": 10 * GIB},
        measured={"weights": 11 * GIB},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "calibration.jsonl"


def test_what_is_written_is_read_again_in_its_order(path: Path) -> None:
    for name in "abc":
        append_load(path, load(name))
    assert read_calibration(path) == Calibration(loads=(load("a"), load("b"), load("c")))


def test_a_later_line_of_a_load_replaces_the_earlier(path: Path) -> None:
    for each in (load("a"), load("b"), load("a", measured={"weights": 12 * GIB})):
        append_load(path, each)
    found = read_calibration(path).loads
    assert [(x.load_id, x.measured["weights"] // GIB) for x in found] == [("b", 11), ("a", 12)]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"format": 2}',
        b'{"format": 1, "kind": 3}',
    ],
    ids=lambda line: repr(line[:20]),
)
def test_a_line_that_says_nothing_is_skipped_and_counted(path: Path, line: bytes) -> None:
    append_load(path, load("a"))
    with path.open("ab") as file:
        file.write(line + b"\n")
    append_load(path, load("b"))
    found = read_calibration(path)
    assert [x.load_id for x in found.loads] == ["a", "b"]
    assert found.num_skipped == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"measured": {"weights": -1}},
        {"measured": {"weights": 1 << 60}},
        {"measured": {"weights": "11"}},
        {"measured": {"weights": True}},
        {"measured": [1]},
        {"measured": {str(n): 1 for n in range(100)}},
        {"estimated": None},
        {"architecture": 3},
        {"architecture": "x" * 1000},
        {"at_s": "now"},
        {"unknown": 1},
        {"kind": {"engine": "vllm"}},
        {"kind": {**asdict(KIND), "tensor_parallel_size": "1"}},
        {"kind": []},
    ],
    ids=str,
)
def test_a_line_with_impossible_values_is_skipped(path: Path, changes: dict) -> None:
    append_load(path, load("a"))
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(document) + "\n")
    assert read_calibration(path) == Calibration(num_skipped=1)


def test_a_torn_line_does_not_take_the_next_one_along(path: Path) -> None:
    append_load(path, load("a"))
    with path.open("ab") as file:
        file.write(b'{"format": 1, "load_id": "to')
    append_load(path, load("b"))
    found = read_calibration(path)
    assert [x.load_id for x in found.loads] == ["a", "b"]
    assert found.num_skipped == 1


def test_the_file_stays_below_its_bound_and_keeps_the_newest(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vram.calibration, "LARGEST_FILE_BYTES", 4000)
    for number in range(100):
        append_load(path, load(str(number)))
        assert path.stat().st_size <= 4000
    found = read_calibration(path)
    assert found.num_skipped == 0
    assert found.loads[-1].load_id == "99"
    assert len(found.loads) >= 3
    assert [x.name for x in path.parent.iterdir() if "lock" not in x.name] == [path.name]


def write_many(path: Path, name: str) -> None:
    for number in range(50):
        append_load(path, load(f"{name}{number}"))


def test_writers_at_once_lose_no_line(path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=write_many, args=(path, name)) for name in "xyz"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = read_calibration(path)
    assert len(found.loads) == 150
    assert found.num_skipped == 0


def test_a_file_is_rewritten_only_while_nobody_else_can_append(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vram.calibration, "LARGEST_FILE_BYTES", 1000)
    others: list[bool] = []

    def replace_watched(target: Path, content: bytes) -> None:
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                others.append(True)
            except BlockingIOError:
                others.append(False)
        target.write_bytes(content)

    monkeypatch.setattr(vram.calibration, "_replace", replace_watched)
    for number in range(10):
        append_load(path, load(str(number)))
    assert others
    assert not any(others)


def test_the_null_device_and_folders_are_left_alone(tmp_path: Path) -> None:
    null = Path(os.devnull)
    append_load(null, load())
    assert null.is_char_device()
    append_load(tmp_path, load())
    for path in (null, tmp_path, tmp_path / "none"):
        assert read_calibration(path) == Calibration()


def test_the_path_is_the_variable_else_in_the_state_folder() -> None:
    assert calibration_path({"BALLAST_CALIBRATION": "/x/y"}) == Path("/x/y")
    assert calibration_path({"XDG_STATE_HOME": "/s"}) == Path("/s/ballast/calibration.jsonl")
    home = Path("~/.local/state/ballast/calibration.jsonl").expanduser()
    assert calibration_path({"XDG_STATE_HOME": "relative"}) == home
    assert calibration_path({}) == home


def test_only_the_very_same_shape_and_version_is_learned_from(shape_of) -> None:
    shape = shape_of("qwen2.5-7b")
    own = load("own", shape=shape_hash(shape))
    relative = load("relative", shape=shape_hash(shape_of("qwen2.5-14b")))
    older = load("older", shape=own.shape, engine_version="0.26.0", measured={"weights": GIB * 9})
    calibration = Calibration(loads=(older, own, relative))
    (found,) = calibration.of(shape, VERSIONS)
    assert (found.num_loads, found.engine_version) == (1, "0.29.0")
    assert found.corrected("weights", 1) == 11 * GIB
    assert calibration.of(shape, {"vllm": "0.30.0"}) == ()
    assert calibration.of(shape_of("llama-3.1-8b"), VERSIONS) == ()


def test_where_the_engine_is_not_installed_the_newest_version_counts(shape_of) -> None:
    shape = shape_of("qwen2.5-7b")
    older = load("older", shape=shape_hash(shape), engine_version="0.26.0")
    newer = load("newer", shape=shape_hash(shape), engine_version="0.29.0")
    (found,) = Calibration(loads=(older, newer)).of(shape, {"vllm": None})
    assert found.engine_version == "0.29.0"


def test_headers_and_earlier_lessons_are_no_part_of_a_shape(shape_of) -> None:
    shape = shape_of("qwen2.5-7b")
    calibration = Calibration(loads=(load(shape=shape_hash(shape)),))
    taught = replace(shape, checkpoint_ratio=1.01, learned=calibration.of(shape, VERSIONS))
    assert taught.learned
    assert shape_hash(taught) == shape_hash(shape)
    assert shape_hash(shape_of("qwen2.5-14b")) != shape_hash(shape)
