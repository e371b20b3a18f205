"""Values that tests of the deployments share."""

from deployments.oom import Cause, Death
from deployments.remembered import Remembered
from vram.ladder import Rung
from vram.settings import EngineSettings

SETTINGS = EngineSettings(
    dtype="float32",
    quantization=None,
    kv_cache_dtype="auto",
    max_model_len=2048,
    max_num_seqs=64,
    max_num_batched_tokens=2048,
    gpu_memory_utilization=0.9,
    kv_cache_memory_bytes=1 << 28,
    tensor_parallel_size=1,
    pipeline_parallel_size=1,
    enforce_eager=True,
)
OUT_OF_MEMORY = Death(
    cause=Cause.DEVICE_MEMORY, phase="running", message="CUDA out of memory. Tried to allocate A"
)
KILLED = Death(cause=Cause.KILLED, phase="running", message="ended by signal 9")


def remembered(rung: Rung) -> Remembered:
    return Remembered(rung=rung, path=(), since_s=1.0, learned_at_s=2.0)
