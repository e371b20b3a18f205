"""The steps down after a death of memory. The policy `fixed` is the users' own four attempts."""

from dataclasses import dataclass, replace

from vram.estimate import estimate
from vram.gpu import Device
from vram.model import ModelShape
from vram.price import price
from vram.settings import EngineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One attempt. `price` is what it gives up, `reason` what it answers.

    A reason to skip it says why it cannot help.
    """

    name: str
    settings: EngineSettings
    price: str
    skipped_reason: str | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Upper bounds that a rung sets."""

    name: str
    gpu_memory_utilization: float
    max_model_len: int | None


STEPS = (
    Step(name="utilisation 0.70", gpu_memory_utilization=0.70, max_model_len=None),
    Step(name="utilisation 0.60, 4096 tokens", gpu_memory_utilization=0.60, max_model_len=4096),
    Step(name="utilisation 0.50, 2048 tokens", gpu_memory_utilization=0.50, max_model_len=2048),
)


def fixed_ladder(
    settings: EngineSettings,
    shape: ModelShape,
    device: Device,
    engine: str = "vllm",
    longest_request_tokens: int = 0,
) -> tuple[Rung, ...]:
    """The user's settings, then three smaller ones; none is above the user's in anything.

    No step makes the context shorter than the longest request in flight: it could not be replayed.
    """
    rungs = [Rung(name="as asked", settings=settings, price="nothing", skipped_reason=None)]
    for step in STEPS:
        smaller = _stepped(settings, step, longest_request_tokens)
        smaller = _with_smaller_cache(smaller, settings, shape, device, engine)
        rungs.append(
            Rung(
                name=step.name,
                settings=smaller,
                price=price(settings, smaller),
                skipped_reason=_skipped_reason(smaller, rungs, shape, device, engine),
            )
        )
    return tuple(rungs)


def _stepped(settings: EngineSettings, step: Step, longest_request_tokens: int) -> EngineSettings:
    context_tokens = settings.max_model_len
    if step.max_model_len is not None:
        context_tokens = min(context_tokens, max(step.max_model_len, longest_request_tokens))
    return replace(
        settings,
        gpu_memory_utilization=min(settings.gpu_memory_utilization, step.gpu_memory_utilization),
        max_model_len=context_tokens,
    )


def _with_smaller_cache(
    smaller: EngineSettings,
    asked: EngineSettings,
    shape: ModelShape,
    device: Device,
    engine: str,
) -> EngineSettings:
    """Explicit cache bytes shrink with the share, and keep one sequence while there is room."""
    asked_bytes = asked.kv_cache_memory_bytes
    if asked_bytes is None:
        return smaller
    estimated = estimate(shape, smaller, device, engine)
    scaled_bytes = int(asked_bytes * smaller.gpu_memory_utilization / asked.gpu_memory_utilization)
    wanted_bytes = max(scaled_bytes, estimated.sequence_bytes)
    cache_bytes = min(asked_bytes, wanted_bytes, estimated.cache_left_bytes)
    return replace(smaller, kv_cache_memory_bytes=max(cache_bytes, 1))


def _skipped_reason(
    settings: EngineSettings,
    earlier: list[Rung],
    shape: ModelShape,
    device: Device,
    engine: str,
) -> str | None:
    for rung in earlier:
        if rung.settings == settings:
            return f"It changes nothing: the same settings as {rung.name!r}."
    return estimate(shape, settings, device, engine).reason or None
