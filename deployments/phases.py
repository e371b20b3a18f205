"""What an engine is doing: its phases, and the functions of vLLM in which it is in each."""

from collections.abc import Iterable
from enum import StrEnum


class Phase(StrEnum):
    """What an engine was doing: the same error means something else in each."""

    INIT_DEVICE = "init_device"
    LOAD_MODEL = "load_model"
    PROFILING = "profiling"
    KV_PLANNING = "kv_planning"
    KV_ALLOCATION = "kv_allocation"
    GRAPH_CAPTURE = "graph_capture"
    WARM_UP = "warm_up"
    EXECUTE_MODEL = "execute_model"


LOADING = tuple(phase for phase in Phase if phase is not Phase.EXECUTE_MODEL)
# What an executor calls of a worker. V1's and V2's runner are both behind it, on GPU and CPU.
WORKER_METHODS = {
    "init_device": Phase.INIT_DEVICE,
    "load_model": Phase.LOAD_MODEL,
    "determine_available_memory": Phase.PROFILING,
    "initialize_from_config": Phase.KV_ALLOCATION,
    "compile_or_warm_up_model": Phase.WARM_UP,
    "execute_model": Phase.EXECUTE_MODEL,
    "sample_tokens": Phase.EXECUTE_MODEL,
    "execute_dummy_batch": Phase.EXECUTE_MODEL,
}
# Functions of vLLM 0.26 to 0.33 that say where one is. The first phase of this list of which one is
# on the stack: a warm-up executes the model, and planning the cache profiles it first.
_FUNCTIONS = (
    (Phase.GRAPH_CAPTURE, {"capture_model", "capture_graphs", "profile_cudagraph_memory"}),
    (Phase.WARM_UP, {"compile_or_warm_up_model", "kernel_warmup", "warmup_kernels"}),
    (Phase.KV_ALLOCATION, {"initialize_from_config", "initialize_kv_cache"}),
    (Phase.PROFILING, {"determine_available_memory", "profile_run"}),
    (Phase.LOAD_MODEL, {"load_model", "reload_weights"}),
    (Phase.INIT_DEVICE, {"init_device", "request_memory"}),
    (Phase.KV_PLANNING, {"get_kv_cache_configs", "_initialize_kv_caches"}),
    (Phase.EXECUTE_MODEL, {"execute_model", "sample_tokens", "execute_dummy_batch", "step"}),
)


def phase_of(frames: Iterable[str]) -> Phase | None:
    """The phase that a stack of function names shows."""
    stack = set(frames)
    return next((phase for phase, functions in _FUNCTIONS if stack & functions), None)
