"""What a model's loads took beside what they were estimated to take: noted, and compared.

`vram.calibration` owns the file, `vram.residuals` what is made of it.
"""

import uuid
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import structlog

from deployments.engines.protocol import Measurement
from deployments.measurements import Measured
from vram.calibration import (
    Load,
    append_load,
    calibration_path,
    read_calibration,
    shape_hash,
)
from vram.estimate import Estimate, estimate
from vram.gpu import Device
from vram.model import ModelShape
from vram.residuals import load_kind
from vram.settings import EngineSettings
from vram.units import gib

# A load that takes more than this beyond its estimate is said aloud.
TOLERANCE = 0.03
# The device is looked at for as long as the engine lives; only what is new is written.
_WORTH_A_LINE = 1.005
_ITEMS = ("weights", "peak_activation", "cuda_graphs", "non_torch")

log = structlog.get_logger(__name__)


def with_calibration(
    shape: ModelShape, env: Mapping[str, str], versions: Mapping[str, str | None]
) -> ModelShape:
    """The shape with what its loads here have taken."""
    path = calibration_path(env)
    calibration = read_calibration(path)
    if calibration.num_skipped:
        _warn_of(path, calibration.num_skipped)
    return replace(shape, learned=calibration.of(shape, versions))


class Learner:
    """Hears every measurement of one model; writes each load once, and again if it has grown."""

    def __init__(
        self,
        model: str,
        shape: ModelShape,
        device: Device,
        engine: str,
        *,
        versions: Mapping[str, str | None],
        path: Path,
    ) -> None:
        self.over_estimate: Mapping[str, float] = {}  # of the newest load, by what was compared
        self.num_loads_above = 0
        self._model = model
        self._shape = shape
        self._device = device
        self._engine = engine
        self._version = versions.get(engine)
        self._path = path
        self._generation = -1
        self._load_id = ""
        self._most_bytes = 0
        self._is_above = False

    def heard(self, measured: Measured, settings: EngineSettings) -> None:
        """A measurement of a life that was loaded with these settings."""
        if self._version is None:
            return  # the fake engine has neither
        if measured.generation != self._generation:
            self._generation = measured.generation
            self._load_id = uuid.uuid4().hex
            self._most_bytes = 0
            self._is_above = False
        use_bytes = device_use_bytes(measured.measurement, self._device, settings)
        if use_bytes <= self._most_bytes * _WORTH_A_LINE and self._most_bytes:
            return
        self._most_bytes = max(use_bytes, 1)  # an unknown use is written once, too
        seen = seen_bytes(measured.measurement, self._device, settings)
        self._compare(seen, settings)
        self._write(seen, settings, measured.at_s)

    def _compare(self, seen: Mapping[str, int], settings: EngineSettings) -> None:
        estimated = estimated_bytes(estimate(self._shape, settings, self._device, self._engine))
        self.over_estimate = over_estimate(estimated, seen)
        above = {k: v for k, v in self.over_estimate.items() if v > 1 + TOLERANCE}
        if not above or self._is_above:
            return
        self._is_above = True
        self.num_loads_above += 1
        what = max(above, key=lambda name: above[name])
        log.warning(
            "load_above_estimate", model=self._model, generation=self._generation, what=what,
            estimated=gib(_sum(estimated, what)), measured=gib(_sum(seen, what)),
            above_percent=round((above[what] - 1) * 100, 1),
        )  # fmt: skip

    def _write(self, seen: Mapping[str, int], settings: EngineSettings, at_s: float) -> None:
        assert self._version is not None
        plain = replace(self._shape, learned=())
        formula = estimate(plain, settings, self._device, self._engine)
        load = Load(
            load_id=self._load_id,
            at_s=at_s,
            architecture=plain.architecture,
            shape=shape_hash(plain),
            engine_version=self._version,
            kind=load_kind(settings, self._device, self._engine),
            estimated=estimated_bytes(formula),
            measured=seen,
        )
        try:
            append_load(self._path, load)
        except OSError as error:
            log.warning("calibration_not_written", path=str(self._path), error=str(error))


def device_use_bytes(measurement: Measurement, device: Device, settings: EngineSettings) -> int:
    """What one GPU holds for the engine, or on a CPU the RAM of its processes; 0 if unknown."""
    if device.kind == "cpu":
        return measurement.resident_bytes
    return measurement.device_bytes // settings.num_gpus


def seen_bytes(
    measurement: Measurement, device: Device, settings: EngineSettings
) -> dict[str, int]:
    """By the estimate's names, what was reported and measured; what is not known is not there."""
    use_bytes = device_use_bytes(measurement, device, settings)
    return {**measurement.reported, **({"device_use": use_bytes} if use_bytes else {})}


def estimated_bytes(estimated: Estimate) -> dict[str, int]:
    """The same of an estimate; the device at its fullest, since nobody knows when it is asked."""
    return {
        **{item.name: item.bytes for item in estimated.items},
        "kv_cache_tokens": estimated.kv_cache_tokens,
        "device_use": estimated.device_use_at_peak_bytes,
    }


def over_estimate(estimated: Mapping[str, int], seen: Mapping[str, int]) -> dict[str, float]:
    """Measured by estimated: of the device, and of what the engine counts besides its cache."""
    compared = {}
    for what in ("device_use", "engine"):
        known = _sum(seen, what)
        expected = _sum({name: estimated.get(name, 0) for name in seen}, what)
        if known and expected:
            compared[what] = known / expected
    return compared


def _sum(sizes: Mapping[str, int], what: str) -> int:
    if what == "device_use":
        return sizes.get("device_use", 0)
    return sum(sizes.get(name, 0) for name in _ITEMS)


@cache  # one plan reads the file several times
def _warn_of(path: Path, num_skipped: int) -> None:
    log.warning("calibration_lines_skipped", path=str(path), lines=num_skipped)
