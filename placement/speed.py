"""Which of two options is faster: memory bandwidth over bytes read. Ranks; promises no number.

A decoding step reads all weights and the cache of its batch once, and a tensor-parallel group adds
two all-reduces per layer (a roofline without compute: Pope et al. 2022, "Efficiently Scaling
Transformer Inference"). Mixtures of experts read less at small batches; their order is the same.
"""

from vram.gpu import Device
from vram.model import ModelShape
from vram.plan import Plan

# GB/s of memory, from the vendor's data sheets of the cards (SXM where there are several).
BANDWIDTH_GB_S = {
    "T4": 320,
    "V100-16GB": 900,
    "V100-32GB": 900,
    "A10G": 600,
    "L4": 300,
    "RTX3090": 936,
    "RTX4090": 1008,
    "RTX5090": 1792,
    "A100-40GB": 1555,
    "A100-80GB": 2039,
    "L40S": 864,
    "A6000": 768,
    "H100-80GB": 3350,
    "H200": 4800,
    "RTXPRO6000": 1597,
    "B200": 8000,
    "GB200": 8000,
}
# A card that the table does not have is ranked as the slowest that it has.
SLOWEST_GB_S = min(BANDWIDTH_GB_S.values())
# Two small all-reduces per layer. Orders of magnitude, not measured here: what matters is that
# a model of 1 GB gains nothing from eight cards and one of 100 GB does.
ALL_REDUCES_PER_LAYER = 2
ALL_REDUCE_S = {True: 12e-6, False: 60e-6}  # over NVLink, over PCIe
TYPICAL_REQUEST_TOKENS = 2048


def step_s(plan: Plan, shape: ModelShape, nvlink: bool, batch: int = 1) -> float:
    """Seconds from one token to the next of a batch of requests of typical length."""
    settings = plan.settings
    cache_bytes = batch * TYPICAL_REQUEST_TOKENS * plan.estimate.token_bytes
    read_bytes = plan.estimate.item("weights").bytes + cache_bytes
    stages_s = settings.pipeline_parallel_size * read_bytes / _bytes_per_s(plan.device)
    if settings.tensor_parallel_size == 1:
        return stages_s
    return stages_s + shape.num_layers * ALL_REDUCES_PER_LAYER * ALL_REDUCE_S[nvlink]


def tokens_per_s(plan: Plan, shape: ModelShape, nvlink: bool) -> float:
    """Of one replica whose cache is full of requests of typical length."""
    fitting = plan.estimate.kv_cache_tokens // TYPICAL_REQUEST_TOKENS
    batch = max(1, min(plan.settings.max_num_seqs, fitting))
    return batch / step_s(plan, shape, nvlink, batch)


def _bytes_per_s(device: Device) -> float:
    return 1e9 * BANDWIDTH_GB_S.get(device.name, SLOWEST_GB_S)
