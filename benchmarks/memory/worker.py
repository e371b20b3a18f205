"""vLLM's own GPU worker, with its memory read between the steps of a start. Changes no step.

vLLM logs sizes rounded to 0.01 GiB and throws the rest away; `worker_cls` is its own setting to
name another worker. What was read is appended to a file at once, so that a start that dies of
memory still leaves its numbers.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from vllm.v1.worker.gpu_worker import Worker

from benchmarks.memory.worker_notes import NOTES_PATH

STATS = {
    "torch_allocated_bytes": "allocated_bytes.all.current",
    "torch_allocated_peak_bytes": "allocated_bytes.all.peak",
    "torch_reserved_bytes": "reserved_bytes.all.current",
    "torch_reserved_peak_bytes": "reserved_bytes.all.peak",
    "torch_inactive_split_bytes": "inactive_split_bytes.all.current",
    "torch_alloc_retries": "num_alloc_retries",
    "torch_ooms": "num_ooms",
}


class MeasuredWorker(Worker):
    """Notes what the device and torch's allocator hold after each step."""

    def init_device(self) -> None:
        super().init_device()
        self._note(
            "context",
            context_bytes=self.init_snapshot.cuda_memory,
            context_torch_bytes=self.init_snapshot.torch_memory,
            requested_bytes=int(self.requested_memory),
            total_bytes=self.init_snapshot.total_memory,
            v2_model_runner=self.use_v2_model_runner,
        )

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        model = self.model_runner.get_model()
        self._note(
            "weights",
            weight_bytes=int(self.model_runner.model_memory_usage),
            parameter_bytes=sum(_storage_sizes(model.parameters())),
            buffer_bytes=sum(_storage_sizes(model.buffers())),
        )

    def determine_available_memory(self) -> int:
        available_bytes = super().determine_available_memory()
        profiled = {
            "peak_activation_bytes": "peak_activation_memory",
            "non_torch_bytes": "non_torch_memory",
            "cuda_graph_estimate_bytes": "cudagraph_memory_estimate",
            "available_kv_cache_bytes": "available_kv_cache_memory_bytes",
        }
        # None of these exists when kv_cache_memory_bytes turns the profiling off.
        sizes = {
            name: int(getattr(self, attribute))
            for name, attribute in profiled.items()
            if hasattr(self, attribute)
        }
        self._note("profiled", **sizes)
        return available_bytes

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        self._note(
            "kv_cache",
            num_gpu_blocks=kv_cache_config.num_blocks,
            kv_cache_bytes=sum(tensor.size for tensor in kv_cache_config.kv_cache_tensors),
            kv_cache_tensors=len(kv_cache_config.kv_cache_tensors),
            kv_cache_groups=[_describe(group) for group in kv_cache_config.kv_cache_groups],
        )

    def compile_or_warm_up_model(self) -> Any:
        capture = self.model_runner.capture_model

        def measured_capture(*args: Any, **options: Any) -> int:
            self._note("before_graphs")
            size_bytes = capture(*args, **options)
            self._note("graphs", cuda_graph_bytes=int(size_bytes))
            return size_bytes

        self.model_runner.capture_model = measured_capture
        times = super().compile_or_warm_up_model()
        self._note("warm")
        return times

    def memory_now(self) -> dict[str, int]:
        """For `collective_rpc`; the peaks start anew."""
        now = _memory()
        torch.cuda.reset_peak_memory_stats()
        return now

    def _note(self, step: str, **facts: Any) -> None:
        path = os.environ.get(NOTES_PATH)
        if path is None:
            return
        with open(f"{path}.rank{self.rank}", "a") as notes:
            notes.write(json.dumps({"step": step, **facts, **_memory()}) + "\n")


def _memory() -> dict[str, int]:
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    stats = torch.cuda.memory_stats()
    return {
        "device_used_bytes": total_bytes - free_bytes,
        **{name: stats.get(key, 0) for name, key in STATS.items()},
    }


def _storage_sizes(tensors: Iterator[torch.Tensor]) -> list[int]:
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return [tensor.untyped_storage().nbytes() for tensor in storages.values()]


def _describe(group: Any) -> dict[str, Any]:
    """A cache group by its layers and the plain values of its spec."""
    spec = group.kv_cache_spec
    plain = {}
    if is_dataclass(spec):
        values = {field.name: getattr(spec, field.name) for field in fields(spec)}
        plain = {
            name: value
            for name, value in values.items()
            if isinstance(value, int | str) or value is None
        }
    return {
        "layers": len(group.layer_names),
        "spec": type(spec).__name__,
        "page_size_bytes": spec.page_size_bytes,
        **plain,
        "dtype": str(getattr(spec, "dtype", None)),
    }
