"""vLLM, as far as it dies: EngineCore and its workers, in processes beside this one.

vLLM's own front (tokenizer, detokenizer, stop strings, logprobs, the OpenAI layer) stays in this
process and outlives them: see `vllm_front`.
"""

import asyncio
import copy
import os
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from deployments import allocator, orphans, processes
from deployments.cards import holders_of
from deployments.engines import leftovers, vllm_faults
from deployments.engines.protocol import Listener, LoadFailed, Measurement
from deployments.engines.vllm_memory import lines_beside, read_reported
from deployments.engines.vllm_plugin import BLACK_BOX, EMITTED, PROMPT
from deployments.errors import EngineDied
from deployments.faults import Fault
from deployments.last_words import LastWord, read_lines
from deployments.oom import death_of
from vram.settings import EngineSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest

_END_S = 10.0  # of a killed process
_LOOK_AGAIN_S = 0.2


class VLLMEngine:
    """Engine[EngineCoreRequest]."""

    def __init__(
        self,
        make_config: Callable[[EngineSettings], "VllmConfig"],
        *,
        faults: Sequence[Fault] = (),
    ) -> None:
        self._make_config = make_config
        self._faults = tuple(faults)
        self._num_lives = 0
        self._life = ""
        self._core: Any = None  # vllm.v1.engine.core_client.AsyncMPClient
        self._reader: asyncio.Task[None] | None = None
        self._spawning: asyncio.Future[tuple[VllmConfig, Any]] | None = None
        self._segments: frozenset[Path] = frozenset()
        self._life_folder = Path("no life yet")
        self.config: VllmConfig | None = None  # the one that the front was made with

    @property
    def core(self) -> Any:
        """vLLM's client of the running EngineCore, for calls that are none of the five."""
        if self._core is None:
            raise EngineDied("vLLM's EngineCore is not running")
        return self._core

    async def start(self, settings: EngineSettings, listener: Listener) -> None:
        self._life = uuid.uuid4().hex
        self._num_lives += 1
        try:
            self._life_folder = Path(tempfile.mkdtemp(prefix=orphans.folder_prefix()))
            # It blocks until the engine has loaded or failed.
            self._spawning = asyncio.ensure_future(asyncio.to_thread(self._spawn, settings))
            config, self._core = await asyncio.shield(self._spawning)
        except Exception as error:
            words = self._last_words()
            raise LoadFailed(death_of("loading", words=words, error=error)) from error
        if self.config is None:
            self.config = config
        # vLLM's front checks requests against the first configuration: its context is today's.
        self.config.model_config.max_model_len = config.model_config.max_model_len
        self._segments = processes.shared_memory_segments(processes.find(self._life))
        _variables_stay(True)
        self._reader = asyncio.create_task(self._read(self._core, listener))

    async def generate(self, request: "EngineCoreRequest", emitted: Sequence[int]) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self.core.add_request_async(resumed(request, emitted))
        except EngineDeadError as error:
            raise EngineDied(str(error)) from error

    async def abort(self, request_ids: Sequence[str]) -> None:
        if self._core is not None:
            await self._core.abort_requests_async(list(request_ids))

    async def measure(self) -> Measurement:
        found = await asyncio.to_thread(processes.find, self._life)
        return Measurement(
            resident_bytes=await asyncio.to_thread(processes.resident_bytes, found),
            device_bytes=device_bytes(found),
            process_ids=tuple(process.pid for process in found),
            reported=read_reported(lines_beside(self._black_box)),
        )

    async def stop(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
            self._reader = None
        await processes.reap(self._life)
        await self._end_spawning()
        core, self._core = self._core, None
        if core is not None:
            _variables_stay(False)  # each life has some of its own
            await asyncio.to_thread(_shut_down, core)
        for segment in self._segments:
            segment.unlink(missing_ok=True)
        self._segments = frozenset()
        leftovers.remove(self._life_folder)

    async def _end_spawning(self) -> None:
        """A load that was given up goes on in its thread until what it waits for is dead."""
        spawning, self._spawning = self._spawning, None
        while spawning is not None and not spawning.done():
            await processes.reap(self._life)
            await asyncio.wait({spawning}, timeout=_LOOK_AGAIN_S)
        if spawning is not None and self._core is None and spawning.exception() is None:
            _, self._core = spawning.result()

    @property
    def _black_box(self) -> Path:
        return self._life_folder / "black_box.jsonl"

    def _spawn(self, settings: EngineSettings) -> tuple["VllmConfig", Any]:
        from vllm.v1.engine.core_client import EngineCoreClient
        from vllm.v1.executor import Executor

        config = self._make_config(settings)
        # Only what starts here inherits it: vLLM has helpers of its own that are no engines.
        os.environ[BLACK_BOX] = str(self._black_box)
        faults = vllm_faults.environment(self._faults, self._num_lives)
        try:
            with (
                processes.marked(self._life),
                leftovers.kept_in(self._life_folder),
                allocator.environment(settings),
                processes.told(faults),
            ):
                core = EngineCoreClient.make_async_mp_client(
                    vllm_config=config, executor_class=Executor.get_class(config), log_stats=True
                )
        finally:
            del os.environ[BLACK_BOX]
        return config, core

    async def _read(self, core: Any, listener: Listener) -> None:
        while True:
            try:
                listener.stepped(await core.get_output_async())
            except Exception as error:  # a bug in the listener too: else nobody would read on
                death = death_of(
                    "running",
                    words=self._last_words(),
                    error=error,
                    exit_codes=exit_codes_of(core),
                )
                listener.died(death)
                return

    def _last_words(self) -> tuple[LastWord, ...]:
        try:
            text = self._black_box.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ()
        self._black_box.unlink()
        return read_lines(text.splitlines())


def _variables_stay(stay: bool) -> None:
    """Whether vLLM may remember what it read in the environment: it reads some for every token."""
    from vllm import envs

    if stay:
        envs.enable_envs_cache()
    else:
        envs.disable_envs_cache()


def _shut_down(core: Any) -> None:
    """End vLLM's client of an engine whose processes have been killed.

    A dying process has lost its environment before it is gone, so the reaper can't see its mark and
    does not wait for it; and vLLM's own shutdown raises `psutil.NoSuchProcess` over a process that
    ends while it looks for its children, and leaves its sockets open.
    """
    for process in getattr(core.resources.engine_manager, "processes", ()):
        process.join(_END_S)
    core.shutdown(0.0)


def exit_codes_of(core: Any) -> tuple[int, ...]:
    """Of EngineCore processes that have ended; a worker's end is in EngineCore's log."""
    ended = getattr(core.resources.engine_manager, "processes", ())
    return tuple(process.exitcode for process in ended if process.exitcode is not None)


def resumed(request: "EngineCoreRequest", emitted: Sequence[int]) -> "EngineCoreRequest":
    """The request as it enters an engine that has to go on after `emitted`."""
    if not emitted:
        return request
    again = copy.copy(request)
    again.prompt_token_ids = [*(request.prompt_token_ids or ()), *emitted]
    params = request.sampling_params.clone() if request.sampling_params else None
    if params is not None:
        params.extra_args = {
            **(params.extra_args or {}),
            EMITTED: len(emitted),
            PROMPT: len(request.prompt_token_ids or ()),
        }
        params.prompt_logprobs = None  # the client has them since the first token
    again.sampling_params = params
    return again


def device_bytes(found: Sequence[psutil.Process]) -> int:
    """Memory that these processes hold on NVIDIA GPUs; 0 where there is no such GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    ids = {process.pid for process in found}
    total = 0
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        total += sum(held.held_bytes for held in holders_of(handle) if held.process_id in ids)
    return total
