"""Which death was memory. Reads exceptions, exit codes and log lines; knows nothing of engines."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from vram.shortage import Shortage


class Cause(StrEnum):
    """What the engine died of, as far as the answer to it differs."""

    DEVICE_MEMORY = "device_memory"  # step the settings down
    HOST_MEMORY = "host_memory"  # the node's RAM: smaller engine settings do not help
    SHARED_MEMORY = "shared_memory"  # /dev/shm is full
    REFUSED = "refused"  # the engine does not offer these settings, such as an fp8 cache
    KILLED = "killed"  # ended from outside, or by a signal
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """How one life of an engine ended."""

    cause: Cause
    phase: str  # "loading" or "running"
    message: str
    shortage: Shortage | None = None  # of device memory
    requests: tuple[str, ...] = ()  # ids in the batch of the step that died

    @property
    def is_memory(self) -> bool:
        return self.cause is Cause.DEVICE_MEMORY

    def __str__(self) -> str:
        return f"{self.cause.value} while {self.phase}: {self.message}"


# Source of each: the memory errors of vLLM 0.26-0.33, torch, CUDA, cuBLAS, NCCL and TensorRT-LLM.
_DEVICE_MEMORY = re.compile(
    r"CUDA out of memory"
    r"|CUDA error: out of memory"
    r"|Cuda failure 2 'out of memory'"
    r"|CUDA Error: out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|No available memory for the cache blocks"
    r"|larger than the available KV cache memory"
    r"|larger than the maximum number of tokens that can be stored in KV cache"
    r"|not enough GPU memory available to serve even a single token"
    r"|is less than desired (?:GPU|CPU) memory utilization"
    r"|exceeds available Mamba cache blocks"
    r"|Error in memory profiling"
    r"|Executor creation failed due to insufficient GPU memory"
    r"|DefaultCPUAllocator: can't allocate memory"
    r"|DefaultCPUAllocator: not enough memory",
    re.IGNORECASE,
)
# torch's class, not Ray's: `ray.exceptions.OutOfMemoryError` is the node's RAM.
_TORCH_OUT_OF_MEMORY = re.compile(r"torch(?:\.cuda)?\.(?:\w+\.)?OutOfMemoryError")
_HOST_MEMORY = re.compile(
    r"ray\.exceptions\.OutOfMemoryError"
    r"|killed due to the node running low on memory"
    r"|Cannot allocate memory"
    r"|No space left on device",
    re.IGNORECASE,
)
# Shared memory of a Triton kernel and wild pointers are bugs, however much they talk of memory.
_NOT_MEMORY = re.compile(
    r"OutOfResources|illegal memory access|shared memory, Required", re.IGNORECASE
)


def classify(text: str) -> Cause:
    """The cause that an error text, or a log of one, speaks of."""
    if _NOT_MEMORY.search(text):
        return Cause.OTHER
    if _DEVICE_MEMORY.search(text) or _TORCH_OUT_OF_MEMORY.search(text):
        return Cause.DEVICE_MEMORY
    if _HOST_MEMORY.search(text):
        return Cause.HOST_MEMORY
    return Cause.OTHER


def death_from_exception(error: BaseException, phase: str, root_cause: str = "") -> Death:
    """Classify an exception by itself, by what it wraps, and by the root cause logged elsewhere."""
    chain = [f"{type(e).__module__}.{type(e).__qualname__}: {e}" for e in _chain(error)]
    text = "\n".join([root_cause, *chain])
    return Death(cause=classify(text), phase=phase, message=_first_line(root_cause or chain[0]))


def death_from_exit(exit_code: int | None, phase: str, root_cause: str = "") -> Death:
    """Classify the end of a process: by its own last words, else by how it ended."""
    if root_cause:
        return Death(cause=classify(root_cause), phase=phase, message=_first_line(root_cause))
    if exit_code is not None and exit_code < 0:
        return Death(cause=Cause.KILLED, phase=phase, message=f"ended by signal {-exit_code}")
    return Death(cause=Cause.OTHER, phase=phase, message=f"ended with exit code {exit_code}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, then what it was raised from, then what it was raised during."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
        if not isinstance(error, BaseException):
            return


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:500] if text.strip() else "no message"
