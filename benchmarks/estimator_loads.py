"""The measured loads in results/memory_*.jsonl as values, and their fixed halves."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.memory.models import CONFIGS
from vram.estimate import Estimate, estimate
from vram.gpu import Device, device_named
from vram.model import ModelShape
from vram.settings import EngineSettings
from vram.units import GIB

RESULTS = Path(__file__).parent / "results"
TEST_CONFIGS = Path(__file__).parents[1] / "tests" / "vram" / "configs"

# vLLM's own defaults for the offline class `LLM` on this card, which the loads were made with.
DEFAULTS: dict[str, Any] = {
    "dtype": "bfloat16",
    "quantization": None,
    "kv_cache_dtype": "auto",
    "max_num_seqs": 1024,
    "max_num_batched_tokens": 16384,
    "gpu_memory_utilization": 0.9,
    "kv_cache_memory_bytes": None,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "enforce_eager": False,
}
# Of two halves by the first bit of this hash, the constants may only be fitted on one. The salt
# was chosen for mixtures of experts, eager loads and fp8 in both halves, before any comparison.
SALT = "estimator "
OTHER_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One load: what was asked for, and what was measured or how it failed."""

    model: str
    arguments: dict[str, Any]
    other_allocator: bool  # an experiment with torch's allocator: never judged
    measured: dict[str, float]  # GiB, tokens
    failure: str
    source: str

    @property
    def half(self) -> str:
        key = f"{SALT}{self.model} {json.dumps(self.arguments, sort_keys=True)}"
        return "report" if hashlib.sha256(key.encode()).digest()[0] % 2 else "fit"

    @property
    def name(self) -> str:
        shown = {key: value for key, value in self.arguments.items() if key in SHORT}
        return " ".join([self.model, *(f"{SHORT[key]}{_short(v)}" for key, v in shown.items())])

    @property
    def settings(self) -> EngineSettings:
        known = set(EngineSettings.__dataclass_fields__)
        given = {key: value for key, value in self.arguments.items() if key in known}
        return EngineSettings(**(DEFAULTS | given))

    @property
    def shape(self) -> ModelShape:
        return ModelShape.from_config(_config(self.model))

    def estimated(self, device: Device) -> Estimate:
        return estimate(self.shape, self.settings, device)


SHORT = {
    "max_model_len": "len ",
    "gpu_memory_utilization": "share ",
    "max_num_batched_tokens": "batch ",
    "max_num_seqs": "seqs ",
    "quantization": "",
    "kv_cache_dtype": "cache ",
    "kv_cache_memory_bytes": "cache bytes ",
    "enforce_eager": "eager ",
    "tensor_parallel_size": "TP ",
}
MEASURED = {
    "weights": "weight_gib",
    "peak_activation": "peak_activation_gib",
    "cuda_graphs": "cuda_graph_gib",
    "non_torch": "non_torch_gib",
    "kv_cache": "kv_cache_gib",
    "kv_cache_tokens": "kv_cache_tokens",
    "device": "device_used_after_64_requests_gib",
    "device_hard": "device_used_after_hard_load_gib",
}


def device() -> Device:
    """The card of all loads."""
    return device_named("H200")


def read_loads(paths: Iterable[Path] | None = None) -> list[Load]:
    """Every measured load in the repository, or in the given files."""
    found = []
    for path in sorted(paths or RESULTS.glob("memory_*.jsonl")):
        found += [_load(json.loads(line), path) for line in path.read_text().splitlines() if line]
    return found


def fitted(loads: list[Load], half: str) -> list[Load]:
    """The loads of one half that started, and that may be judged."""
    return [
        load
        for load in loads
        if load.half == half and not load.failure and not load.other_allocator
    ]


def _load(line: dict[str, Any], path: Path) -> Load:
    arguments = line["args"]
    failure = line.get("root_cause") or line.get("error_seen_by_parent") or ""
    measured = {name: line[key] for name, key in MEASURED.items() if line.get(key) is not None}
    if not failure:
        measured.setdefault("cuda_graphs", 0.0)
        measured.setdefault("non_torch", 0.22)  # one of the first lines lacks it
    return Load(
        model=line["model"],
        arguments=arguments,
        other_allocator=OTHER_ALLOCATOR in line.get("case", ""),
        measured=measured,
        failure=str(failure),
        source=path.name,
    )


def _config(model: str) -> dict[str, Any]:
    if model in CONFIGS:
        return CONFIGS[model]
    return json.loads((TEST_CONFIGS / model / "config.json").read_text())


def _short(value: object) -> str:
    if isinstance(value, bool):
        return ""
    return f"{value / GIB:.0f} GiB" if isinstance(value, int) and value > GIB else str(value)
