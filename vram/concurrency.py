"""Room for so many requests of so many tokens at once: what it takes, and why there is none."""

from dataclasses import replace

from vram.budget import within
from vram.errors import DoesNotFit, Invalid
from vram.estimate import estimate
from vram.gpu import Device
from vram.model import ModelShape
from vram.remedy import describe
from vram.settings import EngineSettings
from vram.wishes import Wishes

# What a request is taken for where nobody says it.
COMFORTABLE_CONTEXT_TOKENS = 8192
# No plan makes its batch smaller than this by itself.
FEWEST_SEQUENCES = 16


def check_wishes(shape: ModelShape, wishes: Wishes) -> None:
    """Refuses a context or a concurrency that no card could give."""
    if wishes.context is not None:
        if wishes.context < 1:
            raise Invalid(f"context is {wishes.context}; it is at least 1 token", "context")
        if wishes.context > shape.max_context_tokens:
            raise Invalid(
                f"context {wishes.context} is above the model's maximum of "
                f"{shape.max_context_tokens} tokens; a longer one needs rope_scaling in "
                "config.json",
                "context",
            )
        if wishes.max_model_len is not None and wishes.max_model_len < wishes.context:
            raise Invalid(
                f"context {wishes.context} is above max_model_len {wishes.max_model_len}: "
                "remove one of them",
                "context",
            )
    if wishes.concurrency is not None:
        if not 1 <= wishes.concurrency <= 1 << 20:
            raise Invalid(
                f"concurrency is {wishes.concurrency}; it is 1 to {1 << 20}", "concurrency"
            )
        if wishes.max_num_seqs is not None and wishes.max_num_seqs < wishes.concurrency:
            raise Invalid(
                f"concurrency {wishes.concurrency} is above max_num_seqs {wishes.max_num_seqs}: "
                "remove one of them",
                "concurrency",
            )


def wished_cache_bytes(
    shape: ModelShape, settings: EngineSettings, wishes: Wishes, device: Device, engine: str
) -> int:
    """KV cache per GPU that holds `concurrency` requests of `context` tokens."""
    if wishes.concurrency is None:
        return 0
    one = replace(settings, max_model_len=min(request_tokens(wishes), settings.max_model_len))
    return wishes.concurrency * estimate(shape, one, device, engine).sequence_bytes


def request_tokens(wishes: Wishes) -> int:
    """The tokens of one request, as wished."""
    return wishes.context or COMFORTABLE_CONTEXT_TOKENS


def too_many_at_once(
    label: str,
    shape: ModelShape,
    settings: EngineSettings,
    wishes: Wishes,
    device: Device,
    engine: str,
    limit_bytes: int,
) -> DoesNotFit | None:
    """The refusal if it is the concurrency that does not fit; None if one request does not."""
    if wishes.concurrency is None or within(shape, settings, device, engine, limit_bytes) is None:
        return None
    most = 1
    below, above = 1, wishes.concurrency
    while below <= above:
        most_yet = (below + above) // 2
        fewer = replace(wishes, concurrency=most_yet)
        smaller = settings
        if wishes.max_num_seqs is None:
            sequences = min(settings.max_num_seqs, max(most_yet, FEWEST_SEQUENCES))
            smaller = replace(settings, max_num_seqs=sequences)
        cache_bytes = wished_cache_bytes(shape, smaller, fewer, device, engine)
        if within(shape, smaller, device, engine, limit_bytes, cache_bytes) is None:
            above = most_yet - 1
        else:
            most, below = most_yet, most_yet + 1
    estimated = estimate(shape, settings, device, engine)
    wished_bytes = wished_cache_bytes(shape, settings, wishes, device, engine)
    tokens = min(request_tokens(wishes), settings.max_model_len)
    return DoesNotFit(
        f"{label} with {wishes.concurrency} requests of {tokens} tokens at once on "
        f"{describe(device, settings.num_gpus)}",
        estimated.needed_bytes - estimated.sequence_bytes + wished_bytes,
        limit_bytes,
        f"It fits with concurrency {most}.",
        "concurrency",
    )
