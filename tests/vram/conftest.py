"""Real models and the settings that the recorded loads ran with."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vram.model import ModelShape
from vram.settings import EngineSettings

CONFIGS = Path(__file__).parent / "configs"


@pytest.fixture(scope="session")
def shape_of() -> Callable[[str], ModelShape]:
    def read(name: str) -> ModelShape:
        return ModelShape.from_config(json.loads((CONFIGS / name / "config.json").read_text()))

    return read


@pytest.fixture(scope="session")
def settings_with() -> Callable[..., EngineSettings]:
    def make(**changes: object) -> EngineSettings:
        # vLLM 0.26's own defaults for `LLM` on an H200, which the recorded loads had.
        values: dict[str, object] = {
            "dtype": "bfloat16",
            "quantization": None,
            "kv_cache_dtype": "auto",
            "max_model_len": 8192,
            "max_num_seqs": 1024,
            "max_num_batched_tokens": 16384,
            "gpu_memory_utilization": 0.9,
            "kv_cache_memory_bytes": None,
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "enforce_eager": False,
        }
        return EngineSettings(**(values | changes))  # type: ignore[arg-type]

    return make
