"""The black box inside vLLM's processes: what they died of, in a file, before they are gone.

The parent of a dead engine is told "Engine core initialization failed" and no more. Here, in
EngineCore and in each worker, an exception is written down where it leaves the worker, with the
phase, the batch and the device's numbers; so is everything that vLLM logs as an error.
"""

import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypedDict

from deployments.last_words import LastWord, described, shortened
from deployments.phases import WORKER_METHODS, Phase, phase_of


class BlackBox(logging.Handler):
    """One for each process: a handler for vLLM's logger, and a watch over its worker's methods."""

    def __init__(self, path: str) -> None:
        super().__init__(level=logging.ERROR)
        self._path = path
        self._batch: Any = None  # vLLM's SchedulerOutput of the step that runs, or ran last
        self._device_type = ""
        self._depth = 0  # of watched methods: a warm-up calls `execute_model`
        self._written: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            text = shortened(record.getMessage())
            self._write(LastWord(process_id=os.getpid(), logged=text))
        elif error is not self._written:
            self.write_exception(error, logged=shortened(record.getMessage()))

    def watch(self, worker: Any, device_type: str = "") -> None:
        """Write down what the methods of this worker raise."""
        self._device_type = device_type
        for name, phase in WORKER_METHODS.items():
            method = getattr(worker, name, None)
            if method is not None:
                setattr(worker, name, self._watched(method, phase))

    def write_exception(
        self,
        error: BaseException,
        *,
        logged: str = "",
        default_phase: Phase | None = None,
        is_fatal: bool = False,
    ) -> None:
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        phase = phase_of(frames) or default_phase
        scheduled = getattr(self._batch, "num_scheduled_tokens", {})
        self._written = error
        self._write(
            LastWord(
                process_id=os.getpid(),
                errors=described(error),
                logged=logged,
                is_fatal=is_fatal,
                phase=phase,
                device_type=self._device_type,
                requests=tuple(scheduled) if phase is Phase.EXECUTE_MODEL else (),
                **device_sizes(),
            )
        )

    def _watched(self, method: Callable[..., Any], phase: Phase) -> Callable[..., Any]:
        @functools.wraps(method)
        def watched(*args: Any, **options: Any) -> Any:
            if method.__name__ == "execute_model" and args:
                self._batch = args[0]
            self._depth += 1
            try:
                return method(*args, **options)
            except Exception as error:
                if self._depth == 1:
                    self.write_exception(error, default_phase=phase, is_fatal=True)
                raise
            finally:
                self._depth -= 1

        return watched

    def _write(self, word: LastWord) -> None:
        """At once and whole: one call of the kernel, and nothing is left open."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            file = os.open(self._path, flags, 0o600)
        except OSError:  # the folder is gone with its replica, or is on another node
            return
        try:
            with suppress(OSError):  # a full disk: what happened must not become that
                os.write(file, f"{word.line()}\n".encode(errors="replace"))
        finally:
            os.close(file)


class DeviceSizes(TypedDict, total=False):
    """Of this process's GPU, in bytes."""

    free_bytes: int
    total_bytes: int
    reserved_bytes: int  # by the allocator, and not in use


def device_sizes() -> DeviceSizes:
    """What torch says of the GPU; nothing where there is none to ask."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    try:
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    except RuntimeError:  # after an illegal access every call fails
        return {}
    return {"free_bytes": free, "total_bytes": total, "reserved_bytes": reserved}


def is_open() -> bool:
    """Whether this process has one: vLLM loads a plugin more than once."""
    handlers = logging.getLogger("vllm").handlers
    return any(isinstance(handler, BlackBox) for handler in handlers)


def install(path: str) -> bool:
    """Open the box in this process of vLLM; False where it is open already."""
    if is_open():
        return False
    box = BlackBox(path)
    logging.getLogger("vllm").addHandler(box)
    _watch_workers(box)
    return True


def _watch_workers(box: BlackBox) -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    make = WorkerBase.__init__

    @functools.wraps(make)
    def make_watched(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        from vllm.platforms import current_platform

        box.watch(self, str(current_platform.device_type))

    WorkerBase.__init__ = make_watched  # type: ignore[method-assign]
