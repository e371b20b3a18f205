"""Every sentence of the table, as its engine says it, in the phase where it is said."""

from dataclasses import dataclass, replace

import pytest

from deployments.oom_messages import Cause, is_consequence, read
from deployments.phases import Phase
from vram.shortage import Shortage, ShortageKind
from vram.units import GIB, MIB, gib_to_bytes

TORCH = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total "
    "capacity of 79.25 GiB of which 512.00 MiB is free. Process 4242 has 30.00 GiB memory in use. "
    "Process 4243 has 2.00 GiB memory in use. Including non-PyTorch memory, this process has 46.75 "
    "GiB memory in use. Of the allocated memory 45.00 GiB is allocated by PyTorch, with 1.00 GiB "
    "allocated in private pools (e.g., CUDA Graphs), and 256.00 MiB is reserved by PyTorch but "
    "unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
TORCH_SAYS = Shortage(
    kind=ShortageKind.UNKNOWN,
    asked_bytes=gib_to_bytes(1.5),
    free_bytes=512 * MIB,
    total_bytes=gib_to_bytes(79.25),
    reserved_bytes=256 * MIB,
    others_bytes=32 * GIB,
)
DRIVER = (
    "torch.AcceleratorError: CUDA error: out of memory\nCUDA kernel errors might be asynchronously "
    "reported at some other API call, so the stacktrace below might be incorrect."
)
INDUCTOR = (
    "torch._inductor.exc.InductorError: OutOfMemoryError: CUDA out of memory. Tried to allocate "
    "594.00 MiB. GPU 0 has a total capacity of 15.77 GiB of which 71.88 MiB is free."
)
WARMING_UP = (
    "builtins.RuntimeError: CUDA out of memory occurred when warming up {} dummy requests. Please "
    "try lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine."
)
TRT_LLM = (
    "builtins.RuntimeError: Executor creation failed due to insufficient GPU memory.\n\nThe "
    "following component could not be created: {}\nTotal GPU memory (GiB): 79.25"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A message, where it is said, and what lacks."""

    text: str
    phase: Phase | None = None
    shortage: Shortage


def short(kind: ShortageKind, **gib: float) -> Shortage:
    counts = {key: int(gib.pop(key)) for key in ("max_model_len", "max_num_seqs") if key in gib}
    sizes = {f"{key}_bytes": gib_to_bytes(value) for key, value in gib.items()}
    return Shortage(kind=kind, **sizes, **counts)


CASES = {
    "vllm: not free": Case(
        text="builtins.ValueError: Free memory on device cuda:0 (37.61/79.25 GiB) on startup is "
        "less than desired GPU memory utilization (0.9, 71.33 GiB). Decrease GPU memory "
        "utilization or reduce GPU memory used by other processes.",
        phase=Phase.INIT_DEVICE,
        shortage=short(ShortageKind.NOT_FREE, asked=71.33, free=37.61, total=79.25),
    ),
    "vllm: not free on a CPU": Case(
        text="builtins.ValueError: Available memory on node 0 (3.99/22.80 GiB) on startup is less "
        "than desired CPU memory utilization (0.5, 11.40 GiB). On the CPU backend, the "
        "`--gpu-memory-utilization` flag controls the fraction of CPU memory reserved (despite "
        "its name).",
        shortage=short(ShortageKind.NOT_FREE, asked=11.4, free=3.99, total=22.8),
    ),
    "vllm 0.33: less than the budget": Case(
        text="builtins.ValueError: Free memory on device cuda:0 (20.0/79.25 GiB) is less than the "
        "engine's budget after excluding external process's weights (0.9, 30.0 GiB).",
        phase=Phase.INIT_DEVICE,
        shortage=short(ShortageKind.NOT_FREE),
    ),
    "vllm 0.33: weights held elsewhere": Case(
        text="builtins.ValueError: Externally held weights on device cuda:0 (30.0 GiB) exceed the "
        "desired GPU memory utilization (0.3, 23.8 GiB).",
        phase=Phase.INIT_DEVICE,
        shortage=short(ShortageKind.NO_CACHE_BLOCKS),
    ),
    "vllm: disturbed": Case(
        text="builtins.AssertionError: Error in memory profiling. Initial free memory 40.25 GiB, "
        "current free memory 62.50 GiB. This happens when other processes sharing the same "
        "container release GPU memory while vLLM is profiling during initialization. To fix this, "
        "ensure consistent GPU memory allocation or isolate vLLM in its own container.",
        phase=Phase.PROFILING,
        shortage=short(ShortageKind.DISTURBED, free=62.5),
    ),
    "vllm: no cache blocks": Case(
        text="builtins.ValueError: No available memory for the cache blocks. Try increasing "
        "`gpu_memory_utilization` when initializing the engine.",
        phase=Phase.KV_PLANNING,
        shortage=short(ShortageKind.NO_CACHE_BLOCKS),
    ),
    "vllm: cannot auto-fit": Case(
        text="builtins.ValueError: Cannot auto-fit max_model_len: not enough GPU memory available "
        "to serve even a single token. Try increasing `gpu_memory_utilization`.",
        phase=Phase.KV_PLANNING,
        shortage=short(ShortageKind.NO_CACHE_BLOCKS),
    ),
    "vllm: context too long": Case(
        text="builtins.ValueError: To serve at least one request with the model's max seq len "
        "(131072), (16.00 GiB KV cache is needed, which is larger than the available KV cache "
        "memory (6.50 GiB). Based on the available memory, the estimated maximum model length is "
        "53248. Try increasing `gpu_memory_utilization` or decreasing `max_model_len`.",
        phase=Phase.KV_PLANNING,
        shortage=short(ShortageKind.CONTEXT_TOO_LONG, asked=16, free=6.5, max_model_len=53248),
    ),
    "vllm: context too long, no estimate": Case(
        text="builtins.ValueError: To serve at least one request with the model's max seq len "
        "(131072), (16.00 GiB KV cache is needed, which is larger than the available KV cache "
        "memory (0.01 GiB). Try increasing `gpu_memory_utilization`.",
        phase=Phase.KV_PLANNING,
        shortage=short(ShortageKind.CONTEXT_TOO_LONG, asked=16, free=0.01),
    ),
    "vllm 0.8: context too long": Case(
        text="ValueError: The model's max seq len (32768) is larger than the maximum number of "
        "tokens that can be stored in KV cache (16208). Try increasing "
        "`gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine.",
        shortage=short(ShortageKind.CONTEXT_TOO_LONG, max_model_len=16208),
    ),
    "vllm: Mamba": Case(
        text="builtins.ValueError: max_num_seqs (1024) exceeds available Mamba cache blocks (412). "
        "Each decode request needs one Mamba state block. Please lower max_num_seqs to at most 412 "
        "or increase gpu_memory_utilization.",
        phase=Phase.GRAPH_CAPTURE,
        shortage=short(ShortageKind.TOO_MANY_SEQUENCES, max_num_seqs=412),
    ),
    "vllm: cache on a CPU": Case(
        text="builtins.ValueError: Available memory on node 0 (3.99/22.80 GiB) on kv cache "
        "allocation is less than requested memory for kv (8.00 GiB). Decrease "
        "--kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other "
        "processes.",
        phase=Phase.PROFILING,
        shortage=short(ShortageKind.CACHE_ALLOCATION, asked=8, free=3.99, total=22.8),
    ),
    "vllm: nothing left for the cache on a CPU": Case(
        text="builtins.ValueError: Available memory on node 0 (3.99/22.80 GiB) on kv cache "
        "allocation is less than requested memory for kv (-0.31/0.23 GiB). Reduce CPU memory used "
        "by other processes.",
        phase=Phase.PROFILING,
        shortage=short(ShortageKind.NO_CACHE_BLOCKS),
    ),
    "vllm: sampler": Case(
        text=f"{WARMING_UP.format('sampler with 1024')}\n{TORCH}",
        phase=Phase.PROFILING,
        shortage=replace(TORCH_SAYS, kind=ShortageKind.WARM_UP),
    ),
    "vllm: pooler": Case(
        text=WARMING_UP.format("pooler (task=embed) with 256"),
        phase=Phase.PROFILING,
        shortage=short(ShortageKind.WARM_UP),
    ),
    "vllm: what V1's runner logs of weights": Case(
        text="Failed to load model - not enough GPU memory. Try lowering --gpu-memory-utilization "
        "to free memory for weights. (original error: CUDA out of memory. Tried to allocate 2.00 "
        "GiB)",
        phase=Phase.LOAD_MODEL,
        shortage=short(ShortageKind.WEIGHTS, asked=2),
    ),
    "vllm: what the executor says": Case(
        text="builtins.RuntimeError: Worker failed with error 'CUDA out of memory. Tried to "
        "allocate 2.00 GiB.', please check the stack trace above for the root cause",
        phase=Phase.EXECUTE_MODEL,
        shortage=short(ShortageKind.RUN_TIME, asked=2),
    ),
    "vllm: sleep mode": Case(
        text="builtins.RuntimeError: CUDA Error: out of memory at csrc/cumem_allocator.cpp:119",
        shortage=short(ShortageKind.CACHE_ALLOCATION),
    ),
    "vllm: sleep mode, weights": Case(
        text="builtins.RuntimeError: CUDA Error: out of memory at csrc/cumem_allocator.cpp:119",
        phase=Phase.LOAD_MODEL,
        shortage=short(ShortageKind.WEIGHTS),
    ),
    "inductor": Case(
        text=INDUCTOR,
        phase=Phase.PROFILING,
        shortage=Shortage(
            kind=ShortageKind.ACTIVATIONS,
            asked_bytes=594 * MIB,
            free_bytes=round(71.88 * MIB),
            total_bytes=round(15.77 * GIB),
        ),
    ),
    "torch 1": Case(
        text="torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; "
        "23.50 GiB total capacity; 20.25 GiB already allocated; 1.25 GiB free; 21.00 GiB reserved "
        "in total by PyTorch)",
        phase=Phase.EXECUTE_MODEL,
        shortage=short(ShortageKind.RUN_TIME, asked=2, free=1.25, total=23.5),
    ),
    "torch without a message": Case(
        text="torch.OutOfMemoryError: ", phase=None, shortage=short(ShortageKind.UNKNOWN)
    ),
    "cuBLAS": Case(
        text="builtins.RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling "
        "`cublasCreate(handle)`",
        phase=Phase.EXECUTE_MODEL,
        shortage=short(ShortageKind.OUTSIDE_ALLOCATOR),
    ),
    "cuDNN": Case(
        text="builtins.RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        phase=Phase.PROFILING,
        shortage=short(ShortageKind.OUTSIDE_ALLOCATOR),
    ),
    "NCCL": Case(
        text="torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:77, "
        "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
        "Cuda failure 2 'out of memory'",
        phase=Phase.INIT_DEVICE,
        shortage=short(ShortageKind.OUTSIDE_ALLOCATOR),
    ),
    "driver, at work": Case(
        text=DRIVER, phase=Phase.EXECUTE_MODEL, shortage=short(ShortageKind.OUTSIDE_ALLOCATOR)
    ),
    "driver, capturing": Case(
        text=DRIVER, phase=Phase.GRAPH_CAPTURE, shortage=short(ShortageKind.GRAPH_CAPTURE)
    ),
    "driver, at the start": Case(
        text=DRIVER, phase=Phase.INIT_DEVICE, shortage=short(ShortageKind.NOT_FREE)
    ),
    "TensorRT-LLM: cache": Case(
        text=TRT_LLM.format("KV cache"), shortage=short(ShortageKind.CACHE_ALLOCATION)
    ),
    "TensorRT-LLM: first cache": Case(
        text=TRT_LLM.format("Initial KV cache (temporary for KV cache size estimation)"),
        shortage=short(ShortageKind.ACTIVATIONS),
    ),
    "TensorRT-LLM: model": Case(text=TRT_LLM.format("Model"), shortage=short(ShortageKind.WEIGHTS)),
    "TensorRT-LLM: sampler": Case(
        text=TRT_LLM.format("Sampler"), shortage=short(ShortageKind.WARM_UP)
    ),
    "TensorRT-LLM: another": Case(
        text=TRT_LLM.format("Drafter"), shortage=short(ShortageKind.UNKNOWN)
    ),
    "SGLang: cache": Case(
        text="builtins.RuntimeError: Not enough memory. Please try to increase "
        "--mem-fraction-static.",
        shortage=short(ShortageKind.NO_CACHE_BLOCKS),
    ),
    "SGLang: graphs": Case(
        text="builtins.Exception: Capture cuda graph failed: CUDA out of memory. Tried to allocate "
        "1.00 GiB.\nPossible solutions:\n1. set --mem-fraction-static to a smaller value",
        shortage=short(ShortageKind.GRAPH_CAPTURE, asked=1),
    ),
    "LMDeploy: cache": Case(
        text="builtins.RuntimeError: No enough gpu memory for kv cache.",
        shortage=short(ShortageKind.NO_CACHE_BLOCKS),
    ),
    "LMDeploy: state": Case(
        text="builtins.RuntimeError: No enough gpu memory for state cache",
        shortage=short(ShortageKind.NO_CACHE_BLOCKS),
    ),
    "LMDeploy: runtime": Case(
        text="builtins.RuntimeError: No enough gpu memory for runtime.",
        shortage=short(ShortageKind.ACTIVATIONS),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_shortage_is_read_with_its_numbers(case: Case) -> None:
    reading = read(case.text, case.phase)
    assert reading.cause is Cause.DEVICE_MEMORY
    assert reading.shortage == case.shortage


@pytest.mark.parametrize(
    ("phase", "kind"),
    [
        (Phase.INIT_DEVICE, ShortageKind.NOT_FREE),
        (Phase.LOAD_MODEL, ShortageKind.WEIGHTS),
        (Phase.PROFILING, ShortageKind.ACTIVATIONS),
        (Phase.KV_PLANNING, ShortageKind.UNKNOWN),
        (Phase.KV_ALLOCATION, ShortageKind.CACHE_ALLOCATION),
        (Phase.GRAPH_CAPTURE, ShortageKind.GRAPH_CAPTURE),
        (Phase.WARM_UP, ShortageKind.WARM_UP),
        (Phase.EXECUTE_MODEL, ShortageKind.RUN_TIME),
        (None, ShortageKind.UNKNOWN),
    ],
)
def test_torch_s_message_means_what_the_phase_makes_of_it(
    phase: Phase | None, kind: ShortageKind
) -> None:
    assert read(TORCH, phase).shortage == replace(TORCH_SAYS, kind=kind)


def test_wrappers_that_repeat_a_message_do_not_count_other_processes_twice() -> None:
    twice = read(f"builtins.RuntimeError: Worker failed with error '{TORCH}'\n{TORCH}").shortage
    assert twice == TORCH_SAYS


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on "
            "memory.",
            Cause.HOST_MEMORY,
        ),
        (
            "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this "
            "task. Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: 1 worker(s) were "
            "killed due to the node running low on memory.",
            Cause.HOST_MEMORY,
        ),
        ("builtins.MemoryError: ", Cause.HOST_MEMORY),
        ("builtins.OSError: [Errno 12] Cannot allocate memory", Cause.HOST_MEMORY),
        (
            "builtins.OSError: [Errno 28] No space left on device: '/dev/shm/nccl-8XkF2b'",
            Cause.SHARED_MEMORY,
        ),
        ("builtins.OSError: [Errno 28] No space left on device: '/psm_27ab'", Cause.SHARED_MEMORY),
        ("builtins.OSError: [Errno 28] No space left on device", Cause.SHARED_MEMORY),
        (
            "builtins.OSError: [Errno 28] No space left on device: '/cache/torch_compile/a.py'",
            Cause.OTHER,
        ),
        (
            "RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"
            " that dataloader's workers are out of shared memory: insufficient shared memory (shm)",
            Cause.SHARED_MEMORY,
        ),
        (
            "builtins.RuntimeError: NCCL error: Error while creating shared memory segment "
            "/dev/shm/nccl-aBc (size 9637888)",
            Cause.SHARED_MEMORY,
        ),
        (
            "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: "
            "147456, Hardware limit: 101376. Reducing block sizes or `num_stages` may help.",
            Cause.OTHER,
        ),
        (
            "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
            Cause.OTHER,
        ),
        ("NVRM: Xid (PCI:0000:18:00): 79, GPU has fallen off the bus", Cause.OTHER),
        (
            "torch.distributed.DistBackendError: NCCL error: unhandled system error, NCCL version "
            "2.27.5",
            Cause.OTHER,
        ),
        (
            "builtins.RuntimeError: Executor creation failed with NCCL error: unhandled cuda error",
            Cause.OTHER,
        ),
        (
            "builtins.TimeoutError: Timed out waiting for engine core processes to start. This is "
            "often caused by slow weight loading for large models. Waited 600s (configured by "
            "VLLM_ENGINE_READY_TIMEOUT_S).",
            Cause.OTHER,
        ),
        ("vllm.exceptions.QueueOverflowError: 1024 requests wait", Cause.OTHER),
        ("vllm.exceptions.MaxQueuedTokensError: 8192 tokens wait", Cause.OTHER),
        ("ray.exceptions.ActorUnavailableError: The actor is temporarily away", Cause.OTHER),
        ("ray.exceptions.WorkerCrashedError: The worker died unexpectedly", Cause.KILLED),
        ("ray.exceptions.NodeDiedError: the node died", Cause.KILLED),
        (
            "builtins.ValueError: No valid attention backend found for cuda with "
            "AttentionSelectorConfig(head_size=64, kv_cache_dtype=fp8). Reasons: {FLASH_ATTN: "
            "[kv_cache_dtype not supported]}.",
            Cause.REFUSED,
        ),
        (
            "builtins.NotImplementedError: FP8 KV cache is not supported by the Triton attention "
            "backend on this device",
            Cause.REFUSED,
        ),
        (
            "builtins.ValueError: fp8_e5m2 kv-cache is not supported with fp8 checkpoints.",
            Cause.REFUSED,
        ),
        (
            "pydantic_core.ValidationError: 1 validation error for CacheConfig\nkv_cache_dtype\n"
            "  Input should be 'auto' or 'bfloat16'",
            Cause.REFUSED,
        ),
        (
            "builtins.AssertionError: Expandable segments are not compatible with memory pool.",
            Cause.REFUSED,
        ),
        ("builtins.ValueError: a bug", Cause.OTHER),
        ("", Cause.OTHER),
    ],
)
def test_what_is_not_device_memory_has_no_shortage(text: str, cause: Cause) -> None:
    reading = read(text, Phase.EXECUTE_MODEL)
    assert (reading.cause, reading.shortage) == (cause, None)


def test_the_ram_is_device_memory_where_the_cpu_is_the_device() -> None:
    text = (
        "builtins.RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: "
        "can't allocate memory: you tried to allocate 1048576 bytes. Error code 12 (Cannot "
        "allocate memory)"
    )
    assert read(text, Phase.LOAD_MODEL, "cuda").cause is Cause.HOST_MEMORY
    assert read(text, Phase.LOAD_MODEL, "cpu").shortage == Shortage(
        kind=ShortageKind.WEIGHTS, asked_bytes=MIB
    )


@pytest.mark.parametrize(
    "text",
    [
        "Engine core initialization failed. See root cause above. Failed core proc(s): {}",
        "EngineCore encountered an issue. See stack trace (above) for the root cause.",
        "WorkerProc initialization failed due to an exception in a background process. See stack "
        "trace for root cause.",
        "Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor.",
        "RayWorkerProc rank=1 died unexpectedly, shutting down executor.",
        "builtins.RuntimeError: Executor failed.",
        "builtins.RuntimeError: Ray workers have not started successfully.",
        "builtins.RuntimeError: [pair.cc:547] Connection closed by peer [127.0.0.1]:38472",
    ],
)
def test_what_others_see_of_a_death_is_a_consequence(text: str) -> None:
    assert is_consequence(text)
    assert not is_consequence(f"{text}\n{TORCH}")
