"""Loads are noted beside their estimates, and one that takes more is said aloud."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from samples import SETTINGS

from deployments.engines.protocol import Measurement
from deployments.learning import Learner, with_calibration
from deployments.measurements import Measured
from vram.calibration import append_load, read_calibration
from vram.estimate import estimate
from vram.gpu import Device, cpu_device, device_named
from vram.model import ModelShape
from vram.settings import EngineSettings
from vram.units import GIB

ROOT = Path(__file__).resolve().parents[2]
H200 = device_named("H200")
VERSIONS = {"vllm": "0.29.0", "transformers": None}
ON_GPU = replace(
    SETTINGS,
    dtype="bfloat16",
    kv_cache_memory_bytes=None,
    enforce_eager=False,
    max_num_seqs=1024,
    max_num_batched_tokens=16384,
)


@pytest.fixture
def shape() -> ModelShape:
    config = ROOT / "tests/vram/configs/qwen2.5-7b/config.json"
    return ModelShape.from_config(json.loads(config.read_text()))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "calibration.jsonl"


@pytest.fixture
def learner(shape: ModelShape, path: Path) -> Callable[..., Learner]:
    def make(device: Device = H200, engine: str = "vllm", **options: Any) -> Learner:
        values = {"versions": VERSIONS, "path": path} | options
        return Learner("qwen", values.pop("shape", shape), device, engine, **values)

    return make


def measured(device_bytes: int, *, life: int = 1, **reported: int) -> Measured:
    measurement = Measurement(
        resident_bytes=3 * GIB, device_bytes=device_bytes, process_ids=(1,), reported=reported
    )
    return Measured(measurement=measurement, generation=life, at_s=5.0)


def expected(shape: ModelShape, settings: EngineSettings = ON_GPU) -> dict[str, int]:
    found = estimate(shape, settings, H200)
    return {item.name: item.bytes for item in found.items} | {
        "device_use": found.device_use_at_peak_bytes
    }


def test_a_load_is_noted_with_what_was_estimated_and_what_it_took(learner, shape, path) -> None:
    learner().heard(measured(100 * GIB, weights=15 * GIB, kv_cache_tokens=7), ON_GPU)
    (load,) = read_calibration(path).loads
    assert load.measured == {"weights": 15 * GIB, "kv_cache_tokens": 7, "device_use": 100 * GIB}
    assert load.estimated["weights"] == expected(shape)["weights"]
    assert load.estimated["device_use"] == expected(shape)["device_use"]
    assert (load.architecture, load.engine_version) == ("Qwen2ForCausalLM", "0.29.0")
    assert (load.kind.card, load.kind.tensor_parallel_size) == ("H200", 1)


def test_the_next_estimate_of_the_same_kind_is_what_the_load_took(learner, shape, path) -> None:
    learner().heard(measured(100 * GIB, weights=15 * GIB), ON_GPU)
    env = {"BALLAST_CALIBRATION": str(path)}
    taught = with_calibration(shape, env, VERSIONS)
    assert estimate(taught, ON_GPU, H200).item("weights").bytes == 15 * GIB
    other = replace(ON_GPU, max_model_len=1024, gpu_memory_utilization=0.5)
    assert estimate(taught, other, H200).item("weights").bytes == 15 * GIB
    untaught = with_calibration(shape, {"BALLAST_CALIBRATION": "/dev/null"}, VERSIONS)
    assert estimate(untaught, ON_GPU, H200) == estimate(shape, ON_GPU, H200)


def test_a_load_is_estimated_by_the_formula_also_when_something_was_learned(
    learner, shape, path
) -> None:
    """Else each lesson would be taken from the last one."""
    learner().heard(measured(100 * GIB, weights=15 * GIB), ON_GPU)
    taught = with_calibration(shape, {"BALLAST_CALIBRATION": str(path)}, VERSIONS)
    learner(shape=taught).heard(measured(100 * GIB, weights=15 * GIB), ON_GPU)
    first, second = read_calibration(path).loads
    assert first.estimated == second.estimated


def test_a_life_is_one_load_however_often_it_is_measured(learner, path) -> None:
    one = learner()
    for device_bytes in (100 * GIB, 90 * GIB, 100 * GIB, 110 * GIB):
        one.heard(measured(device_bytes), ON_GPU)
    (load,) = read_calibration(path).loads
    assert load.measured["device_use"] == 110 * GIB
    assert len(path.read_text().splitlines()) == 2
    one.heard(measured(50 * GIB, life=2), ON_GPU)
    assert len(read_calibration(path).loads) == 2


def test_of_a_split_model_each_gpu_holds_its_part(learner, path) -> None:
    settings = replace(ON_GPU, tensor_parallel_size=2)
    learner().heard(measured(200 * GIB), settings)
    (load,) = read_calibration(path).loads
    assert load.measured == {"device_use": 100 * GIB}


def test_on_the_cpu_the_device_is_the_ram_of_the_engine(learner, path) -> None:
    settings = replace(SETTINGS, kv_cache_memory_bytes=GIB)
    learner(cpu_device(64 * GIB)).heard(measured(0, kv_cache=GIB), settings)
    (load,) = read_calibration(path).loads
    assert load.measured == {"kv_cache": GIB, "device_use": 3 * GIB}
    assert load.kind.card == "CPU"


def test_an_engine_without_a_version_is_not_learned_from(learner, path) -> None:
    learner(engine="fake").heard(measured(GIB), ON_GPU)
    learner(engine="transformers").heard(measured(GIB), ON_GPU)
    assert not path.exists()


@pytest.mark.parametrize(
    ("percent", "is_said"), [(-10, False), (0, False), (2.9, False), (3.1, True), (40, True)]
)
@pytest.mark.parametrize("what", ["device_use", "engine"])
def test_a_load_more_than_three_percent_above_its_estimate_is_said_once(
    learner, shape, what: str, percent: float, is_said: bool
) -> None:
    one, estimated = learner(), expected(shape)
    size_bytes = int(estimated["device_use" if what == "device_use" else "weights"])
    size_bytes = int(size_bytes * (1 + percent / 100))
    seen = measured(size_bytes) if what == "device_use" else measured(0, weights=size_bytes)
    with structlog.testing.capture_logs() as logs:
        one.heard(seen, ON_GPU)
        one.heard(seen, ON_GPU)
    said = [line for line in logs if line["event"] == "load_above_estimate"]
    assert len(said) == is_said
    assert one.num_loads_above == is_said
    assert one.over_estimate == {what: pytest.approx(1 + percent / 100, abs=1e-6)}
    if is_said:
        assert said[0]["what"] == what
        assert said[0]["above_percent"] == pytest.approx(percent, abs=0.1)
        assert said[0]["log_level"] == "warning"


def test_a_load_above_its_estimate_is_the_measure_of_the_next_one(learner, shape, path) -> None:
    above = int(expected(shape)["device_use"] * 1.05)
    learner().heard(measured(above), ON_GPU)
    taught = with_calibration(shape, {"BALLAST_CALIBRATION": str(path)}, VERSIONS)
    second = learner(shape=taught)
    second.heard(measured(above, life=2), ON_GPU)
    assert second.num_loads_above == 0
    assert second.over_estimate["device_use"] == pytest.approx(1, abs=1e-6)


def test_a_folder_that_cannot_be_written_is_a_warning_and_no_failure(learner, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    one = learner(path=tmp_path / "file" / "calibration.jsonl")
    with structlog.testing.capture_logs() as logs:
        one.heard(measured(GIB), ON_GPU)
    assert [line["event"] for line in logs] == ["calibration_not_written"]


def test_lines_that_cannot_be_read_are_one_warning(learner, shape, path) -> None:
    learner().heard(measured(100 * GIB, weights=15 * GIB), ON_GPU)
    with path.open("a") as file:
        file.write("{broken\nnonsense\n")
    env = {"BALLAST_CALIBRATION": str(path)}
    with structlog.testing.capture_logs() as logs:
        taught = [with_calibration(shape, env, VERSIONS) for _ in range(3)]
    assert [(line["event"], line["lines"]) for line in logs] == [("calibration_lines_skipped", 2)]
    assert all(each.learned for each in taught)


def test_recorded_loads_of_an_h200_teach_the_estimate_of_their_kind(path) -> None:
    """Each load's own weights, activations and cache, after one lesson: within their rounding."""
    lines = (ROOT / "tests/vram/vllm_h200.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    names = {"weights": "weight_gib", "peak_activation": "peak_activation_gib"}
    names |= {"non_torch": "non_torch_gib"}
    started = [r for r in records if all(name in r for name in names.values())]
    assert len(started) >= 5
    for record in started:
        config = ROOT / "tests/vram/configs" / record["model"] / "config.json"
        shape = ModelShape.from_config(json.loads(config.read_text()))
        settings = replace(ON_GPU, **record["args"])
        said = {name: int(record[key] * GIB) for name, key in names.items()}
        learner = Learner(record["model"], shape, H200, "vllm", versions=VERSIONS, path=path)
        path.unlink(missing_ok=True)
        learner.heard(measured(0, **said), settings)
        taught = with_calibration(shape, {"BALLAST_CALIBRATION": str(path)}, VERSIONS)
        found = estimate(taught, settings, H200)
        for name, size_bytes in said.items():
            assert found.item(name).bytes == pytest.approx(size_bytes, abs=2), record["model"]


def test_an_older_file_may_have_items_that_are_new_to_us(learner, shape, path) -> None:
    learner().heard(measured(100 * GIB), ON_GPU)
    (load,) = read_calibration(path).loads
    append_load(path, replace(load, load_id="x", measured={"brand_new": 5}))
    taught = with_calibration(shape, {"BALLAST_CALIBRATION": str(path)}, VERSIONS)
    assert estimate(taught, ON_GPU, H200).fits
