"""The ways in which one model could run on the kinds of cards that there are, the best first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

from placement.kinds import CardKind
from placement.requests import Request
from placement.speed import step_s, tokens_per_s
from vram.concurrency import FEWEST_SEQUENCES, check_wishes, request_tokens, wished_cache_bytes
from vram.defaults import settings_for
from vram.errors import Invalid
from vram.estimate import estimate
from vram.gpu import Device
from vram.plan import (
    SHORTEST_CONTEXT_TOKENS,
    Plan,
    fitting_plan,
    is_comfortable,
)
from vram.remedy import SMALLEST_BATCH_TOKENS
from vram.units import GIB
from vram.wishes import Wishes

# Twice the cards have to be worth it: of options this near to the fastest the smallest is taken.
NEAR_THE_FASTEST = 1.15
# Shares are handed out in hundredths; below this a card has more tenants than is wise.
SMALLEST_SHARE = 0.05
SHARES_TO_TRY = 6
# Every stage more lets a request wait once more at every token.
MOST_STAGES = 8
ON_ONE_CARD = frozenset({"transformers", "fake"})
# Engines that can keep the cache in 8 bits.
WITH_FP8_CACHE = frozenset({"vllm", "fake", "sglang"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A plan on one kind of card; `card_bytes` is what it takes of all its cards."""

    plan: Plan
    kind: CardKind
    comfortable: bool  # the context that was asked for, or a long one
    fp8_cache: bool  # which nobody asked for

    @property
    def num_gpus(self) -> int:
        return self.plan.settings.num_gpus

    @property
    def card_bytes(self) -> int:
        return round(self.num_gpus * self.plan.gpu_fraction * self.plan.device.total_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A card and a split on which it does not fit. Bytes per GPU; `problem` for other reasons."""

    device: Device
    tensor_parallel_size: int
    pipeline_parallel_size: int
    needed_bytes: int = 0
    available_bytes: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Menu:
    """All options of a model in the order in which they are tried, and what is none."""

    options: tuple[Option, ...]
    refused: tuple[Refused, ...]


def menu(request: Request, kinds: Sequence[CardKind]) -> Menu:
    """Raises Invalid for wishes that no card could meet."""
    check_wishes(request.shape, request.wishes)
    options: list[Option] = []
    refused: list[Refused] = []
    for kind in kinds:
        if request.device is not None and kind.device.name != request.device.name:
            continue
        for found in _on_kind(request, kind):
            if isinstance(found, Option):
                options.append(found)
            else:
                refused.append(found)
    return Menu(options=tuple(_ranked(request, options)), refused=tuple(refused))


def wishes_of(request: Request) -> Wishes:
    """The wishes with what the objective adds: small steps of prefill where latency counts.

    vLLM, docs/configuration/optimization.md: smaller max_num_batched_tokens, better latency between
    tokens, because fewer prefills slow the decodes down.
    """
    wishes = request.wishes
    if (
        request.objective != "latency"
        or request.engine == "transformers"
        or wishes.max_num_batched_tokens is not None
    ):
        return wishes
    least = max(SMALLEST_BATCH_TOKENS, wishes.max_num_seqs or 0, wishes.concurrency or 0)
    return replace(wishes, max_num_batched_tokens=least)


def _on_kind(request: Request, kind: CardKind) -> Iterator[Option | Refused]:
    """The smallest split that fits, and every larger one where latency may gain from it."""
    wishes = wishes_of(request)
    plain = False
    for tensor, pipeline in splits(request, kind):
        if plain and pipeline > (wishes.pipeline_parallel_size or 1):
            return  # more stages make no token faster
        split = replace(wishes, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
        tried = list(_with_split(request, split, kind))
        yield from tried
        found = [each for each in tried if isinstance(each, Option)]
        plain |= any(option.comfortable and not option.fp8_cache for option in found)
        if request.objective == "cheapest" and any(option.comfortable for option in found):
            return
        if request.objective == "throughput" and plain:
            return


def splits(request: Request, kind: CardKind) -> list[tuple[int, int]]:
    """Tensor x pipeline degrees, the fewest cards first.

    A tensor-parallel group stays on one node. Stages come when the largest such group is too small,
    and only they cross nodes.
    """
    wishes = request.wishes
    if wishes.gpu_fraction is not None and wishes.gpu_fraction < 1:
        return [(wishes.tensor_parallel_size or 1, wishes.pipeline_parallel_size or 1)]
    most = min(kind.total, request.max_gpus or kind.total)
    if kind.is_slice or request.engine in ON_ONE_CARD:
        most = 1
    if wishes.tensor_parallel_size is not None:
        degrees = [wishes.tensor_parallel_size]
    else:
        powers = [1 << exponent for exponent in range(10)]
        degrees = [
            degree
            for degree in sorted({*powers, kind.most_on_a_node})
            if degree <= min(kind.most_on_a_node, most)
            and (degree == 1 or not request.shape.split_problem(degree))
        ]
    if wishes.pipeline_parallel_size is not None:
        return [
            (degree, wishes.pipeline_parallel_size)
            for degree in degrees
            if degree * wishes.pipeline_parallel_size <= most
            or wishes.tensor_parallel_size is not None
        ]
    found = [(degree, 1) for degree in degrees]
    if wishes.tensor_parallel_size is None and request.engine not in ON_ONE_CARD:
        widest = degrees[-1]
        stages = min(most // widest, request.shape.num_layers, MOST_STAGES)
        found += [(widest, number) for number in range(2, stages + 1)]
    return found


def _with_split(request: Request, wishes: Wishes, kind: CardKind) -> Iterator[Option | Refused]:
    """As it is; with 8 bits of cache only where it would be refused or cramped otherwise."""
    plain = _planned(request, wishes, kind, fp8_cache=False)
    if isinstance(plain, Option) and plain.comfortable:
        yield plain
        return
    yield plain
    if _may_have_fp8_cache(request, kind.device):
        smaller = replace(wishes, kv_cache_dtype="fp8")
        found = _planned(request, smaller, kind, fp8_cache=True)
        if isinstance(found, Option) and (isinstance(plain, Refused) or found.comfortable):
            yield found


def _planned(
    request: Request, wishes: Wishes, kind: CardKind, *, fp8_cache: bool
) -> Option | Refused:
    shape, device = request.shape, kind.device
    tensor, pipeline = wishes.tensor_parallel_size or 1, wishes.pipeline_parallel_size or 1
    refused = Refused(device=device, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
    try:
        needed_bytes = _least_bytes(request, wishes, device, tensor, pipeline)
    except Invalid as error:
        return replace(refused, problem=str(error))
    available_bytes = int(device.total_bytes * (wishes.gpu_fraction or 1.0))
    refused = replace(refused, needed_bytes=needed_bytes, available_bytes=available_bytes)
    if needed_bytes > available_bytes:
        return refused
    shares: list[float | None] = [wishes.gpu_fraction]
    if _may_share(request, wishes):
        shares = _shares(needed_bytes, device)
    cramped: Option | None = None
    for share in shares:
        found = fitting_plan(shape, replace(wishes, gpu_fraction=share), device, request.engine)
        if found is None:
            continue
        option = Option(
            plan=found,
            kind=kind,
            comfortable=is_comfortable(shape, found.settings, wishes),
            fp8_cache=fp8_cache,
        )
        if option.comfortable:
            return option
        cramped = option  # the largest share, if it stays so
    return cramped or refused


def _may_share(request: Request, wishes: Wishes) -> bool:
    one = (wishes.tensor_parallel_size or 1) * (wishes.pipeline_parallel_size or 1) == 1
    return request.objective == "cheapest" and wishes.gpu_fraction is None and one


def _shares(least_bytes: int, device: Device) -> list[float | None]:
    """The share that the estimate says, a few above it, and the whole card."""
    hundredths = max(ceil(100 * least_bytes / device.total_bytes), round(100 * SMALLEST_SHARE))
    tried = [one / 100 for one in range(hundredths, hundredths + SHARES_TO_TRY) if one < 100]
    return [*tried, 1.0]


def _may_have_fp8_cache(request: Request, device: Device) -> bool:
    return (
        request.wishes.kv_cache_dtype is None
        and request.shape.kv_cache_dtype is None
        and request.engine in WITH_FP8_CACHE
        and device.kind == "cuda"
        and device.bfloat16  # Ampere and later
        and request.shape.num_kv_heads > 0
    )


def _least_bytes(
    request: Request, wishes: Wishes, device: Device, tensor: int, pipeline: int
) -> int:
    """What a card has to offer at least: the wishes, and the smallest batch around them.

    Raises Invalid for a split or a wish that the model does not allow.
    """
    shape, engine = request.shape, request.engine
    shortest = request_tokens(wishes) if _holds_requests(request) else SHORTEST_CONTEXT_TOKENS
    concurrency = wishes.concurrency or 1
    batch = wishes.max_num_batched_tokens or max(
        SMALLEST_BATCH_TOKENS, concurrency, wishes.max_num_seqs or 0
    )
    smallest = replace(
        wishes,
        max_model_len=wishes.max_model_len or min(shortest, shape.max_context_tokens),
        max_num_batched_tokens=batch,
        max_num_seqs=wishes.max_num_seqs or min(max(FEWEST_SEQUENCES, concurrency), batch),
    )
    settings = settings_for(shape, smallest, device, engine, tensor, pipeline)
    estimated = estimate(shape, settings, device, engine)
    wished_bytes = wished_cache_bytes(shape, settings, wishes, device, engine)
    one_bytes = estimated.sequence_bytes
    return estimated.needed_bytes - one_bytes + max(one_bytes, wished_bytes)


def _holds_requests(request: Request) -> bool:
    """Whether a context shorter than a request's is no option: it is wished, or a share is cut."""
    wishes = request.wishes
    return wishes.context is not None or (
        request.objective == "cheapest" and wishes.gpu_fraction is None
    )


def _ranked(request: Request, options: list[Option]) -> list[Option]:
    """Comfortable before cramped, an untouched cache before fp8, then by the objective."""
    if request.objective == "cheapest":
        return sorted(
            options,
            key=lambda o: (
                not o.comfortable,
                round(o.card_bytes / GIB),
                o.fp8_cache,
                o.plan.device.total_bytes,
                o.plan.device.name,
            ),
        )
    shape = request.shape
    if request.objective == "latency":
        steps = {id(o): step_s(o.plan, shape, o.kind.nvlink) for o in options}
        fastest = min(steps.values(), default=0.0)

        def by_latency(o: Option) -> tuple[object, ...]:
            step = steps[id(o)]
            near = step <= fastest * NEAR_THE_FASTEST
            return (
                not o.comfortable,
                o.fp8_cache,
                not near,
                o.card_bytes if near else step,
                o.kind.device.name,
            )

        return sorted(options, key=by_latency)
    return sorted(
        options,
        key=lambda o: (
            not o.comfortable,
            o.fp8_cache,
            o.num_gpus,
            -tokens_per_s(o.plan, shape, o.kind.nvlink),
            o.kind.device.name,
        ),
    )
