"""The sentences in which engines say what they lack, as a table: sentence -> cause, shortage.

Read in vLLM 0.26, 0.29 and 0.33, torch 2.11 and 2.13, Ray 2.60, TensorRT-LLM 1.2, SGLang and
LMDeploy. What a sentence does not say, the phase does: torch's "CUDA out of memory" is the same
while weights are loaded and while a batch is computed.
"""

import re
from dataclasses import dataclass, replace
from enum import StrEnum

from deployments.phases import Phase
from vram.shortage import Shortage, ShortageKind
from vram.units import GIB, KIB, MIB, gib_to_bytes


class Cause(StrEnum):
    """What the engine died of, as far as the answer to it differs."""

    DEVICE_MEMORY = "device_memory"  # step the settings down
    HOST_MEMORY = "host_memory"  # the node's RAM: smaller engine settings do not help
    SHARED_MEMORY = "shared_memory"  # /dev/shm is full
    REFUSED = "refused"  # the engine does not offer these settings, such as an fp8 cache
    KILLED = "killed"  # ended from outside, or by a signal
    STALLED = "stalled"  # it stood still, and was ended for that
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a text says. `shortage` is there exactly where the cause is device memory."""

    cause: Cause
    shortage: Shortage | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    """`kind` None: the phase decides. The pattern's groups are fields of `Shortage`, or `X_gib`."""

    cause: Cause
    kind: ShortageKind | None
    pattern: re.Pattern[str]


def _row(cause: Cause, kind: ShortageKind | None, *patterns: str) -> _Row:
    return _Row(cause, kind, re.compile("|".join(patterns), re.IGNORECASE))


def _short(kind: ShortageKind | None, *patterns: str) -> _Row:
    return _row(Cause.DEVICE_MEMORY, kind, *patterns)


_N = r"-?[\d.]+"
_ROWS = (
    # Bugs and limits that talk of memory and are none that a smaller setting gives back.
    _row(
        Cause.OTHER, None,
        r"OutOfResources|out of resource: shared memory|shared memory, Required",  # Triton
        r"illegal memory access|misaligned address",
    ),
    _row(
        Cause.HOST_MEMORY, None,
        r"ray\.exceptions\.OutOfMemoryError|NODE_OUT_OF_MEMORY",
        r"killed due to the node running low on memory",
        r"builtins\.MemoryError|std::bad_alloc",
    ),
    _row(
        Cause.SHARED_MEMORY, None,
        r"insufficient shared memory",
        r"Error while creating shared memory segment|unable to (?:open|write to) .*</torch_",
        # A path elsewhere is a full disk.
        r"No space left on device(?!: '/(?!dev/shm|psm_))",
    ),
    # vLLM: start
    _short(
        ShortageKind.NOT_FREE,
        rf"(?:Free memory on device \S+|Available memory on node \S+) \((?P<free_gib>{_N})/"
        rf"(?P<total_gib>{_N}) GiB\) on startup is less than desired [GC]PU memory utilization "
        rf"\({_N}, (?P<asked_gib>{_N}) GiB\)",
    ),
    _short(
        ShortageKind.NOT_FREE,
        r"Free memory .{0,200}is less than the engine's budget",
        r"is less than desired [GC]PU memory utilization",
    ),
    # The share must be larger, as for the cache's blocks: vLLM 0.33 counts foreign weights in it.
    _short(ShortageKind.NO_CACHE_BLOCKS, r"Externally held weights .{0,200}exceed the desired"),
    _short(
        ShortageKind.DISTURBED,
        rf"Error in memory profiling\. Initial free memory {_N} GiB, "
        rf"current free memory (?P<free_gib>{_N}) GiB",
        r"Error in memory profiling",
    ),
    # vLLM: planning the cache
    _short(
        ShortageKind.NO_CACHE_BLOCKS,
        r"No available memory for the cache blocks",
        r"not enough GPU memory available to serve even a single token",
        r"on kv cache allocation is less than requested memory for kv \((?:-|0\.00/)",  # CPU
    ),
    _short(
        ShortageKind.CONTEXT_TOO_LONG,
        rf"\(?(?P<asked_gib>{_N}) GiB KV cache is needed, which is larger than the available "
        rf"KV cache memory \((?P<free_gib>{_N}) GiB\)"
        r"(?:.{0,100}estimated maximum model length is (?P<max_model_len>\d+))?",
    ),
    _short(  # vLLM up to 0.8
        ShortageKind.CONTEXT_TOO_LONG,
        r"larger than the maximum number of tokens that can be stored in KV cache "
        r"\((?P<max_model_len>\d+)\)",
    ),
    _short(
        ShortageKind.TOO_MANY_SEQUENCES,
        r"exceeds available Mamba cache blocks \((?P<max_num_seqs>\d+)\)",
        r"exceeds available Mamba cache blocks",
    ),
    _short(  # vLLM on a CPU
        ShortageKind.CACHE_ALLOCATION,
        rf"Available memory on node \S+ \((?P<free_gib>{_N})/(?P<total_gib>{_N}) GiB\) on kv cache "
        rf"allocation is less than requested memory for kv \((?P<asked_gib>{_N})",
    ),
    _short(ShortageKind.WARM_UP, r"CUDA out of memory occurred when warming up"),
    # Others
    _short(
        ShortageKind.CACHE_ALLOCATION,
        r"component could not be created: KV cache",  # TensorRT-LLM
    ),
    _short(ShortageKind.ACTIVATIONS, r"component could not be created: Initial KV cache"),
    _short(ShortageKind.WARM_UP, r"component could not be created: Sampler"),
    _short(ShortageKind.WEIGHTS, r"component could not be created: Model"),
    _short(None, r"Executor creation failed due to insufficient GPU memory"),
    _short(
        ShortageKind.NO_CACHE_BLOCKS,
        r"Not enough memory\. Please try to increase --mem-fraction-static",  # SGLang
        r"No enough gpu memory for (?:kv cache|state cache)",  # LMDeploy
    ),
    _short(ShortageKind.GRAPH_CAPTURE, r"Capture cuda graph failed: .{0,200}out of memory"),
    _short(ShortageKind.ACTIVATIONS, r"No enough gpu memory for runtime"),
    # Past torch's allocator
    _short(
        ShortageKind.OUTSIDE_ALLOCATOR,
        r"Cuda failure 2 'out of memory'",  # NCCL
        r"CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
    ),
    _short(None, r"CUDA out of memory", r"CUDA error: out of memory", r"CUDA Error: out of memory"),
    # torch's class, not Ray's.
    _short(None, r"torch(?:\.cuda)?\.(?:\w+\.)?OutOfMemoryError"),
    _short(None, r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)"),
    _row(Cause.HOST_MEMORY, None, r"Cannot allocate memory"),
    _row(
        Cause.REFUSED, None,
        r"No valid attention backend found|is not valid for this configuration",
        r"(?:fp8|fp8_e5m2|nvfp4|bfloat16|quantized) kv[- ]cache is not supported",
        r"kv_cache_dtype not supported|kv_cache_dtype\s+Input should be",
        r"not implemented for 'Float8|fp8e4nv not supported",
        r"Expandable segments are not compatible with memory pool",
    ),
    _row(Cause.KILLED, None, r"ray\.exceptions\.(?:WorkerCrashedError|NodeDiedError)"),
)  # fmt: skip
_KINDS = {
    Phase.INIT_DEVICE: ShortageKind.NOT_FREE,
    Phase.LOAD_MODEL: ShortageKind.WEIGHTS,
    Phase.PROFILING: ShortageKind.ACTIVATIONS,
    Phase.KV_ALLOCATION: ShortageKind.CACHE_ALLOCATION,
    Phase.GRAPH_CAPTURE: ShortageKind.GRAPH_CAPTURE,
    Phase.WARM_UP: ShortageKind.WARM_UP,
    Phase.EXECUTE_MODEL: ShortageKind.RUN_TIME,
}
# Where the driver itself is asked, its "out of memory" is of that phase; elsewhere the memory was
# gone beside the allocator: a context, a library's workspace.
_DRIVER = re.compile(r"CUDA error: out of memory")
_DRIVER_PHASES = {Phase.INIT_DEVICE, Phase.KV_ALLOCATION, Phase.GRAPH_CAPTURE}
_SLEEP_MODE = re.compile(r"CUDA Error: out of memory at")  # vLLM's own allocator, for cache first
# An error of these is what others see of a death.
_CONSEQUENCE = re.compile(
    r"Engine core initialization failed"
    r"|EngineCore encountered an issue"
    r"|EngineDeadError"
    r"|WorkerProc initialization failed due to an exception in a background process"
    r"|(?:Worker proc|RayWorkerProc|Engine core proc) .*died unexpectedly"
    r"|Executor failed\."
    r"|Ray workers have not started successfully"
    r"|Input socket thread died during startup"
    r"|builtins\.RuntimeError: cancelled"
    r"|Connection (?:closed|reset) by peer|Broken pipe"
    r"|ncclRemoteError|remote process exited"
)

_SIZE = r"(?P<{}>[\d.]+ (?:[KMGT]iB|bytes))"
# torch 2.x; the last form of the numbers is that of 1.x.
_TORCH_SIZES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"ried to allocate {_SIZE.format('asked')}",
        rf"total capacity of {_SIZE.format('total')} of which {_SIZE.format('free')} is free",
        rf"{_SIZE.format('reserved')} is reserved by PyTorch but unallocated",
        rf"{_SIZE.format('total')} total capacity; .*?; {_SIZE.format('free')} free;",
    )
)
_OTHER_PROCESS = re.compile(rf"Process \d+ has {_SIZE.format('size')} memory in use")
_UNITS = {"bytes": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024 * GIB}


def read(text: str, phase: Phase | None = None, device_type: str = "") -> Reading:
    """What this text says, of an error that was raised in that phase.

    `device_type` "cpu": the engine computes on the CPU, so its device memory is the RAM.
    """
    for row in _ROWS:
        match = row.pattern.search(text)
        if match is None:
            continue
        if row.cause is not Cause.DEVICE_MEMORY:
            return Reading(cause=row.cause)
        if "DefaultCPUAllocator" in text and device_type != "cpu":
            return Reading(cause=Cause.HOST_MEMORY)
        shortage = Shortage(kind=row.kind or _kind(text, phase))
        shortage = replace(shortage, **_torch_sizes(text), **_row_sizes(match))  # type: ignore[arg-type]
        return Reading(cause=row.cause, shortage=shortage)
    return Reading(cause=Cause.OTHER)


def is_consequence(text: str) -> bool:
    """It tells that something died, and not of what."""
    return bool(_CONSEQUENCE.search(text)) and read(text).cause is Cause.OTHER


def _kind(text: str, phase: Phase | None) -> ShortageKind:
    if _SLEEP_MODE.search(text) and phase is None:
        return ShortageKind.CACHE_ALLOCATION
    if _DRIVER.search(text) and phase not in _DRIVER_PHASES:
        return ShortageKind.OUTSIDE_ALLOCATOR
    return ShortageKind.UNKNOWN if phase is None else _KINDS.get(phase, ShortageKind.UNKNOWN)


def _row_sizes(match: re.Match[str]) -> dict[str, int]:
    sizes = {}
    for name, value in match.groupdict().items():
        if value is not None:
            field = name.replace("_gib", "_bytes")
            sizes[field] = gib_to_bytes(float(value)) if field != name else int(value)
    return sizes


def _torch_sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for pattern in _TORCH_SIZES:
        match = pattern.search(text)
        if match is not None:
            for name, size in match.groupdict().items():
                sizes.setdefault(f"{name}_bytes", _bytes(size))
    # Every rank and every wrapper tells of the same processes: those of the first message count.
    first = text.split("Including non-PyTorch memory")[0]
    others = [_bytes(size) for size in _OTHER_PROCESS.findall(first)]
    return {**sizes, "others_bytes": sum(others)} if others else sizes


def _bytes(size: str) -> int:
    number, unit = size.split()
    return round(float(number) * _UNITS[unit])
