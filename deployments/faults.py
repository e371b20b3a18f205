"""Deaths made to order, to rehearse with: what a config may ask for, and when it is due.

Knows no engine. An engine tells a `Rehearsal` what happens in one of its lives and carries out
what is due; one that lives in a process of its own does so by `carry_out`.
"""

import errno
import importlib
import os
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments import oom
from deployments.last_words import LastWord
from deployments.oom import Cause, Death
from deployments.phases import LOADING, Phase

Way = Literal["exception", "sigkill", "sigstop", "exit"]
_EXIT_CODE = 1


class Fault(BaseModel):
    """One death. It happens once in a life, when all that it names has come together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    life: int | None = Field(
        None, ge=1, description="of a replica's engine, the first is 1; left out: every life"
    )
    phase: Phase = Phase.EXECUTE_MODEL
    after_tokens: int = Field(0, ge=0, description="that this life has generated, for everybody")
    prompt_contains: str | None = Field(
        None, min_length=1, description="with a request in the batch whose prompt has this text"
    )
    at_replay: bool = Field(False, description="with a request in the batch that is replayed")
    by: Way | None = Field(
        None, description="left out: `sigkill` for the cause `killed`, else `exception`"
    )
    cause: Literal[Cause.DEVICE_MEMORY, Cause.HOST_MEMORY, Cause.KILLED, Cause.OTHER] = (
        Cause.DEVICE_MEMORY
    )
    message: str | None = Field(
        None, min_length=1, description="of the exception, instead of one as torch and vLLM say it"
    )

    @property
    def way(self) -> Way:
        return self.by or ("sigkill" if self.cause is Cause.KILLED else "exception")

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> "Fault":
        given = self.model_fields_set
        steps_only = given & {"after_tokens", "prompt_contains", "at_replay"}
        if steps_only and self.phase in LOADING:
            raise ValueError(
                f"{', '.join(sorted(steps_only))} has no effect in {self.phase.value}: "
                f"there are no requests before {Phase.EXECUTE_MODEL.value}"
            )
        if self.by == "exception" and self.cause is Cause.KILLED:
            raise ValueError("cause: killed is no exception: write by: sigkill")
        is_signal_of_its_cause = self.way == "sigkill" and self.cause is Cause.KILLED
        if "cause" in given and self.way != "exception" and not is_signal_of_its_cause:
            raise ValueError(f"cause has no effect with by: {self.way}: an exception has a cause")
        if self.message is not None and self.way != "exception":
            raise ValueError(f"message has no effect with by: {self.way}")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class InBatch:
    """A request of the step that is about to run."""

    prompt: str
    is_replayed: bool


class Rehearsal:
    """The faults of one life: told what happens in it, says what is due, each fault once."""

    def __init__(self, faults: Iterable[Fault], life: int) -> None:
        self._waiting = [fault for fault in faults if fault.life in (None, life)]
        self._num_tokens = 0

    @property
    def reads_prompts(self) -> bool:
        """Whether a prompt's text is needed at all: to have it may cost a tokenizer."""
        return any(fault.prompt_contains is not None for fault in self._waiting)

    def entered(self, phase: Phase) -> Fault | None:
        """A phase of the load begins."""
        return self._take(fault for fault in self._waiting if fault.phase is phase)

    def generated(self, num_tokens: int) -> None:
        """A step gave out so many tokens."""
        self._num_tokens += num_tokens

    def stepping(self, batch: Sequence[InBatch]) -> Fault | None:
        """A step with these requests begins."""
        if not batch:
            return None
        return self._take(fault for fault in self._waiting if self._is_due(fault, batch))

    def _is_due(self, fault: Fault, batch: Sequence[InBatch]) -> bool:
        text = fault.prompt_contains
        return (
            fault.phase is Phase.EXECUTE_MODEL
            and self._num_tokens >= fault.after_tokens
            and (text is None or any(text in request.prompt for request in batch))
            and (not fault.at_replay or any(request.is_replayed for request in batch))
        )

    def _take(self, due: Iterable[Fault]) -> Fault | None:
        fault = next(iter(due), None)
        if fault is not None:
            self._waiting.remove(fault)
        return fault


def carry_out(fault: Fault | None) -> None:
    """In the process that has to die: it returns if nothing is due, or if a stop was continued."""
    if fault is None:
        return
    match fault.way:
        case "exception":
            _raise(fault)
        case "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "sigstop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit":
            os._exit(_EXIT_CODE)


def death_of(fault: Fault, requests: Sequence[str] = ()) -> Death | None:
    """What an engine without processes says it died of; None: a stopped one says nothing."""
    phase = "loading" if fault.phase in LOADING else "running"
    match fault.way:
        case "exception":
            error = f"{_class_of(fault)}: {message_of(fault)}"
        case "sigkill":
            return oom.death_from_exit(-signal.SIGKILL, phase)
        case "exit":
            return oom.death_from_exit(_EXIT_CODE, phase)
        case "sigstop":
            return None
    word = LastWord(
        process_id=os.getpid(),
        errors=(error,),
        is_fatal=True,
        phase=fault.phase,
        device_type="cuda",
        requests=tuple(requests),
    )
    return oom.death_of(phase, words=(word,))


def message_of(fault: Fault) -> str:
    """As the real one is worded, with sizes that a small step answers."""
    if fault.message is not None:
        return fault.message
    match fault.cause:
        case Cause.DEVICE_MEMORY if fault.phase is Phase.KV_PLANNING:
            return _NO_CACHE_BLOCKS
        case Cause.DEVICE_MEMORY:
            return _CUDA_OUT_OF_MEMORY
        case Cause.HOST_MEMORY:
            return os.strerror(errno.ENOMEM)
        case _:
            return "a fault that the config asks for"


def _class_of(fault: Fault) -> str:
    """The exception that says it in earnest, because that is read, too."""
    match fault.cause:
        case Cause.DEVICE_MEMORY if fault.phase is Phase.KV_PLANNING:
            return "builtins.ValueError"
        case Cause.DEVICE_MEMORY:
            return "torch.OutOfMemoryError"
        case Cause.HOST_MEMORY:
            return "builtins.MemoryError"
        case _:
            return "builtins.RuntimeError"


def _raise(fault: Fault) -> NoReturn:
    module, _, name = _class_of(fault).rpartition(".")
    raise getattr(importlib.import_module(module), name)(message_of(fault))


# torch 2.13, c10/cuda/CUDACachingAllocator.cpp; what is missing are 16 MiB.
_CUDA_OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.19 GiB of "
    "which 4.00 MiB is free. Including non-PyTorch memory, this process has 79.18 GiB memory in "
    "use. Of the allocated memory 74.11 GiB is allocated by PyTorch, and 3.00 MiB is reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
# vLLM 0.29, v1/core/kv_cache_utils.py.
_NO_CACHE_BLOCKS = (
    "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
    "initializing the engine."
)
