"""In which order a model's options are tried: the meaning of its objective."""

from collections.abc import Callable, Sequence

from placement.options import Option
from placement.requests import Request
from placement.speed import step_s, tokens_per_s
from vram.model import ModelShape
from vram.units import GIB

# Twice the cards have to be worth it: of options this near to the fastest the smallest is taken.
NEAR_THE_FASTEST = 1.15
Key = Callable[[Option], tuple[object, ...]]


def ranked(request: Request, options: Sequence[Option]) -> list[Option]:
    """Comfortable before cramped, an untouched cache before fp8, then by the objective."""
    match request.objective:
        case "cheapest":
            return sorted(options, key=_by_size)
        case "latency":
            return sorted(options, key=_by_latency(request.shape, options))
        case _:
            return sorted(options, key=_by_throughput(request.shape))


def _by_size(option: Option) -> tuple[object, ...]:
    return (
        not option.comfortable,
        round(option.card_bytes / GIB),
        option.fp8_cache,
        option.plan.device.total_bytes,
        option.plan.device.name,
    )


def _by_latency(shape: ModelShape, options: Sequence[Option]) -> Key:
    steps = {id(option): step_s(option.plan, shape, option.kind.nvlink) for option in options}
    fastest_s = min(steps.values(), default=0.0)

    def key(option: Option) -> tuple[object, ...]:
        step = steps[id(option)]
        is_near = step <= fastest_s * NEAR_THE_FASTEST
        return (
            not option.comfortable,
            option.fp8_cache,
            not is_near,
            option.card_bytes if is_near else step,
            option.kind.device.name,
        )

    return key


def _by_throughput(shape: ModelShape) -> Key:
    def key(option: Option) -> tuple[object, ...]:
        return (
            not option.comfortable,
            option.fp8_cache,
            option.num_gpus,
            -tokens_per_s(option.plan, shape, option.kind.nvlink),
            option.kind.device.name,
        )

    return key
