"""Which device memory an engine could not have: where, how much, and how much there was."""

from dataclasses import dataclass
from enum import StrEnum


class ShortageKind(StrEnum):
    """What could not be had, by where in an engine's life it was asked for."""

    NOT_FREE = "not_free"  # start: free on the device is less than the desired share
    WEIGHTS = "weights"
    ACTIVATIONS = "activations"  # the profiling run
    DISTURBED = "disturbed"  # another process released memory while the engine profiled
    NO_CACHE_BLOCKS = "no_cache_blocks"  # nothing is left for the KV cache
    CONTEXT_TOO_LONG = "context_too_long"  # the KV cache is too small for one longest sequence
    TOO_MANY_SEQUENCES = "too_many_sequences"  # more sequences than blocks of Mamba's state
    CACHE_ALLOCATION = "cache_allocation"  # the KV cache was planned and could not be had
    GRAPH_CAPTURE = "graph_capture"
    WARM_UP = "warm_up"  # sampler, pooler, kernels
    RUN_TIME = "run_time"  # a step with requests in it
    OUTSIDE_ALLOCATOR = "outside_allocator"  # cuBLAS, cuDNN, NCCL, driver
    UNKNOWN = "unknown"  # device memory, and nothing says where


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """Sizes in bytes of one device; None is what nobody said."""

    kind: ShortageKind
    asked_bytes: int | None = None  # at KV planning: what one longest sequence needs
    free_bytes: int | None = None  # on the device; at KV planning: for the cache
    total_bytes: int | None = None
    reserved_bytes: int | None = None  # by the allocator, and not in use
    others_bytes: int | None = None  # held by other processes on the device
    max_model_len: int | None = None  # tokens, that would fit by the engine's own estimate
    max_num_seqs: int | None = None  # sequences that would fit by the engine's own count

    @property
    def missing_bytes(self) -> int | None:
        """What was asked for beyond what was free: None where either is unknown."""
        if self.asked_bytes is None or self.free_bytes is None:
            return None
        return max(self.asked_bytes - self.free_bytes, 0)

    @property
    def is_fragmented(self) -> bool:
        """The allocator itself held enough for what was asked, in pieces."""
        if self.asked_bytes is None or self.reserved_bytes is None:
            return False
        return self.reserved_bytes >= self.asked_bytes
