"""What torch's caching allocator keeps of batches that are over. Knows no cache and no weights."""

from vram.activations import (
    PLAIN_SAMPLER_BYTES_PER_LOGIT,
    SAMPLER_BYTES_PER_LOGIT,
    expert_workspace_bytes,
    forward_bytes,
)
from vram.dtypes import dtype_bytes
from vram.gpu import Device
from vram.model import ModelShape
from vram.overhead import EVIDENCE, Overhead, newer_runner
from vram.parts import KeysAndValues
from vram.settings import EngineSettings
from vram.units import ceil_div, gib_to_bytes

# The newer runner's sampler holds the logits in 16 bits and their copy in 32; that of the older one
# is in activations.py.
NEWER_SAMPLER_BYTES_PER_LOGIT = 2 + 4
# The rest: pieces of blocks that serve nothing else. Fitted on the fit half, 0.5 % above the
# measurements, since below them is worse. benchmarks/estimator_fit.py
KEPT_BASE_BYTES = gib_to_bytes(0.460)


def kept_blocks(
    shape: ModelShape, settings: EngineSettings, device: Device, engine: str, peak_bytes: int
) -> Overhead:
    """Beyond the peak of one batch, which is an item of its own."""
    kept_bytes = batch_blocks_bytes(shape, settings, device, engine) + KEPT_BASE_BYTES
    return Overhead(
        size_bytes=max(kept_bytes - peak_bytes, 0),
        formula="base + buffers of a forward pass + of the sampler - peak_activation",
        source=EVIDENCE,
    )


def batch_blocks_bytes(
    shape: ModelShape, settings: EngineSettings, device: Device, engine: str
) -> int:
    """One block for each buffer of a forward pass and of the sampler of all sequences.

    A block is cut for what is smaller, so the sampler's serve a forward pass of half their size;
    in between, more sequences never need less. Not the other way round: the sampler is warmed up
    first.
    """
    batch_bytes = forward_bytes(shape, settings) + _projected_bytes(shape, settings)
    if shape.is_latent:
        # Prompts and single tokens pass through latent attention in two ways, each with buffers of
        # its own. One load, EVIDENCE
        batch_bytes += expert_workspace_bytes(shape, settings)
    sampler_bytes = _sampler_bytes(shape, settings, device, engine)
    return max(sampler_bytes, batch_bytes + min(sampler_bytes, batch_bytes))


def _projected_bytes(shape: ModelShape, settings: EngineSettings) -> int:
    """Queries, keys and values of a batch: their block is not one of the feed-forward's."""
    degree = settings.tensor_parallel_size
    widest = max(
        (
            ceil_div(cache.query_heads, degree) * cache.key_size + cache.elements(degree)
            for kind in shape.kinds
            for cache in kind.caches
            if isinstance(cache, KeysAndValues)
        ),
        default=0,
    )
    return settings.max_num_batched_tokens * widest * dtype_bytes(settings.dtype)


def _sampler_bytes(shape: ModelShape, settings: EngineSettings, device: Device, engine: str) -> int:
    if not shape.generates:
        return 0
    if engine not in ("vllm", "fake"):
        per_logit: float = PLAIN_SAMPLER_BYTES_PER_LOGIT
    elif newer_runner(shape, device, engine):
        per_logit = NEWER_SAMPLER_BYTES_PER_LOGIT
    else:
        per_logit = SAMPLER_BYTES_PER_LOGIT
    return int(settings.max_num_seqs * shape.vocab_size * per_logit)
