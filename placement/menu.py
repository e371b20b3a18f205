"""All ways in which one model could run on the kinds of cards that there are, the best first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

from placement.kinds import CardKind
from placement.options import Option, Refused
from placement.ranking import ranked
from placement.requests import Request
from placement.splits import splits
from vram.concurrency import FEWEST_SEQUENCES, check_wishes, request_tokens, wished_cache_bytes
from vram.defaults import settings_for
from vram.errors import Invalid
from vram.estimate import estimate
from vram.gpu import Device
from vram.plan import SHORTEST_CONTEXT_TOKENS, fitting_plan, is_comfortable
from vram.remedy import SMALLEST_BATCH_TOKENS
from vram.wishes import Wishes

# Shares are handed out in hundredths; below this a card has more tenants than is wise.
SMALLEST_SHARE = 0.05
SHARES_TO_TRY = 6
# Engines that can keep the cache in 8 bits.
WITH_FP8_CACHE = frozenset({"vllm", "fake", "sglang"})


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
    return Menu(options=tuple(ranked(request, options)), refused=tuple(refused))


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
