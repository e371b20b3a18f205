"""The Ray actor that a Hugging Face model lives in: loads it, runs its batch, may die with it.

Two threads: `steps` runs the batch in one; the other takes requests in and answers questions.
Knows nothing of journals and restarts. Whatever goes wrong here ends the life of the engine.
"""

import os
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from deployments.engines.black_box import device_sizes
from deployments.engines.protocol import LoadFailed, Measurement, TokenRequest, TokenStep
from deployments.engines.transformers_faults import MortalBatch
from deployments.errors import Invalid
from deployments.faults import Fault, Rehearsal, carry_out
from deployments.last_words import LastWord, described
from deployments.oom import Death, death_of
from deployments.phases import Phase
from deployments.processes import resident_bytes
from vram.dtypes import canonical_dtype
from vram.settings import EngineSettings

STEPS = "steps"  # the concurrency group of the thread that runs the batch


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpec:
    """What to load and how. `make_batch` takes the arguments of `Batch`; None: `Batch` itself."""

    model_path: str
    settings: EngineSettings
    on_gpu: bool
    threads: int
    trust_remote_code: bool
    options: Mapping[str, str]
    make_batch: Callable[..., Any] | None = None
    life: int = 1
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessId:
    """A process as one can find it again: its number alone may be another's by then."""

    pid: int
    created_at_s: float
    node_id: str


class StepFailed(Exception):
    """The batch loop raised; what is left of the process holds memory and serves nobody."""

    def __init__(self, death: Death) -> None:
        super().__init__(death)
        self.death = death

    def __str__(self) -> str:
        return str(self.death)


class TransformersActor:
    """One life of the engine. Made an actor by the engine, with its resources."""

    def __init__(self, spec: LoadSpec) -> None:
        self._spec = spec
        self._batch: Any = None
        self._rehearsal = Rehearsal(spec.faults, spec.life)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def identify(self) -> ProcessId:
        return ProcessId(
            pid=os.getpid(),
            created_at_s=psutil.Process().create_time(),
            node_id=ray.get_runtime_context().get_node_id(),
        )

    def load(self) -> int:
        """Load the model; returns its number of tokens. Raises `LoadFailed`."""
        during = Phase.INIT_DEVICE
        try:
            carry_out(self._rehearsal.entered(during))
            during = Phase.LOAD_MODEL
            carry_out(self._rehearsal.entered(during))
            model = _load_model(self._spec)
            during = Phase.PROFILING
            carry_out(self._rehearsal.entered(during))
            self._batch = _make_batch(self._spec, model)
            if self._spec.faults:
                self._batch = MortalBatch(self._batch, self._rehearsal, self._spec.model_path)
        except Exception as error:
            raise LoadFailed(self._death(error, "loading", during)) from None
        return int(model.get_input_embeddings().num_embeddings)

    def add(self, request: TokenRequest, emitted: Sequence[int]) -> None:
        self._inbox.put(lambda: self._batch.add(request, emitted))

    def abort(self, request_ids: Sequence[str]) -> None:
        def remove() -> None:
            for request_id in request_ids:
                self._batch.remove(request_id)

        self._inbox.put(remove)

    def measure(self) -> Measurement:
        return Measurement(
            resident_bytes=resident_bytes([psutil.Process()]),
            device_bytes=_device_bytes() if self._spec.on_gpu else 0,
            process_ids=(os.getpid(),),
        )

    @ray.method(concurrency_group=STEPS)  # type: ignore[untyped-decorator]
    def steps(self) -> Iterator[TokenStep]:
        """Run the batch until something ends it: one item for all requests of a step.

        0.1 ms a step is what Ray takes for an item (2 cores, Ray 2.60, 2026-11), so a thread
        of its own for the batch would gain nothing.
        """
        _set_threads(self._spec.threads)
        try:
            while True:
                self._take_in()
                step = self._batch.step()
                if step.outputs:
                    yield step
        except Exception as error:
            raise StepFailed(self._death(error, "running", Phase.EXECUTE_MODEL)) from None

    def _death(self, error: Exception, phase: str, during: Phase) -> Death:
        """Told here, where the exception's own class and the card are."""
        word = LastWord(
            process_id=os.getpid(),
            errors=described(error),
            is_fatal=True,
            phase=during,
            device_type="cuda" if self._spec.on_gpu else "cpu",
            requests=tuple(getattr(self._batch, "request_ids", ())),
            **device_sizes(),
        )
        return death_of(phase, words=[word])

    def _take_in(self) -> None:
        """What came since the last step; with nothing to do, wait for something to come."""
        if not self._batch.has_work:
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get()()


def end_process(process_id: ProcessId, grace_s: float) -> bool:
    """Wait until the process is gone, killing it after `grace_s`; False: it outlived that too."""
    try:
        process = psutil.Process(process_id.pid)
        if abs(process.create_time() - process_id.created_at_s) > 1:
            return True  # gone, and its number is another's
        _, alive = psutil.wait_procs([process], timeout=grace_s)
        for survivor in alive:
            survivor.kill()
        _, alive = psutil.wait_procs(alive, timeout=grace_s)
    except psutil.NoSuchProcess:
        return True
    return not alive


def _load_model(spec: LoadSpec) -> Any:
    if spec.on_gpu:
        # The cache grows by a column a step: 1.7 GiB reserved instead of 2.7 (0.5B model, 64
        # requests, H200, torch 2.11, 2026-11). torch reads it when it is imported.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    _set_threads(spec.threads)
    if spec.on_gpu:
        if not torch.cuda.is_available():
            raise Invalid("the engine was placed on a GPU, but torch sees none in its actor")
        torch.cuda.set_per_process_memory_fraction(spec.settings.gpu_memory_utilization)
        # cuDNN plans anew for each length of the cache: 40 ms a step instead of 12 (same run).
        torch.backends.cuda.enable_cudnn_sdp(False)
    looks_local = spec.model_path.startswith(("/", "./", "../", "~"))
    if looks_local and not Path(spec.model_path).expanduser().is_dir():
        raise Invalid(f"there is no model at {spec.model_path}: no such folder on this node")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(Path(spec.model_path).expanduser()) if looks_local else spec.model_path,
        dtype=canonical_dtype(spec.settings.dtype),
        trust_remote_code=spec.trust_remote_code,
        **spec.options,
    )
    _check_quantization(model, spec.settings.quantization)
    return model.to("cuda" if spec.on_gpu else "cpu").eval()


def _check_quantization(model: Any, wanted: str | None) -> None:
    """A checkpoint's own quantization is used as it is; none is made here."""
    config = getattr(model.config, "quantization_config", None)
    found = (
        config.get("quant_method") if isinstance(config, dict) else config and config.quant_method
    )
    found = getattr(found, "value", found)
    if wanted is not None and wanted != found:
        raise Invalid(
            f"quantization {wanted} was asked for, but the checkpoint has {found or 'none'} and "
            f"the transformers engine makes none itself",
            "quantization",
        )


def _make_batch(spec: LoadSpec, model: Any) -> Any:
    from deployments.engines.transformers_batch import Batch

    settings = spec.settings
    batch = (spec.make_batch or Batch)(
        model,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        kv_cache_memory_bytes=settings.kv_cache_memory_bytes,
    )
    if spec.on_gpu:
        batch.rehearse(min(settings.max_num_batched_tokens, settings.max_model_len))
    return batch


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)  # of the calling thread, too


def _device_bytes() -> int:
    """The card's memory in this process's name; torch's own count where NVML can't see the pid."""
    import pynvml
    import torch

    pynvml.nvmlInit()
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    finally:
        pynvml.nvmlShutdown()
    own = [process.usedGpuMemory or 0 for process in processes if process.pid == os.getpid()]
    return max(*own, int(torch.cuda.max_memory_reserved()), 0)
