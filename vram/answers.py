"""What each shortage is answered with: changes in groups, the best group first.

Inside a group the first that should work is taken; where none should, the first that could.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from vram import changes
from vram.case import Case
from vram.changes import Change
from vram.floor import fits, longest, longest_held, seen_free_bytes
from vram.ladder import fixed_ladder
from vram.settings import EngineSettings
from vram.shortage import ShortageKind
from vram.units import GIB

Group = Iterable[Change]

# Without a number of what was short.
SHARE_LESS_IF_UNKNOWN = 0.05
# The same settings again, where it was not these that were at fault.
TIMES_THE_SAME = 3
# Where an fp8 cache would keep more than twice the context, precision is the smaller price.
CONTEXT_WORTH_KEEPING = 0.5


def answers(case: Case) -> Iterator[Group]:
    """For the latest shortage of the case."""
    yield from _ANSWERS[case.shortage.kind](case, case.settings)


def may_repeat(case: Case) -> bool:
    """Whether the same settings may be tried again: something else was at fault, so many times."""
    if case.repeats >= TIMES_THE_SAME:
        return False
    match case.shortage.kind:
        case ShortageKind.DISTURBED:
            return True
        case ShortageKind.NOT_FREE:
            return seen_free_bytes(case, case.shortage) is None
        case ShortageKind.WEIGHTS:  # they are known to the byte: if they fit, somebody was in them
            return fits(case, case.settings)
    return False


def less_bytes(case: Case) -> int:
    """What was missing and a margin, twice as much each time that it was not enough."""
    total_bytes = case.model.device.total_bytes
    missing_bytes = case.shortage.missing_bytes or 0
    margin_bytes = max(min(total_bytes // 100, GIB // 2), missing_bytes // 4)
    return int((missing_bytes + margin_bytes) * 2 ** (case.repeats - 1))


def _not_free(case: Case, settings: EngineSettings) -> Iterator[Group]:
    yield from _same_again(case, settings)
    free_bytes = seen_free_bytes(case, case.shortage)
    if free_bytes is None:
        share = settings.gpu_memory_utilization - SHARE_LESS_IF_UNKNOWN * case.repeats
        free_bytes = int(max(share, SHARE_LESS_IF_UNKNOWN) * case.model.device.total_bytes)
    free = changes.share_of_free(case, settings, min(free_bytes, case.model.limit_bytes))
    smaller = Change(name="smaller share", settings=free)
    yield _with_room(case, (smaller,))
    yield _with_room(case, _smaller_batch(case, free))
    yield (replace(smaller, check="cache"),)
    yield from _smaller_context(case, free)
    for change in _smaller_batch(case, free):
        yield from _smaller_context(case, change.settings)
    yield from _fp8_weights(case, free)
    yield from _least(case, free)


def _weights(case: Case, settings: EngineSettings) -> Iterator[Group]:
    yield from _same_again(case, settings)
    if case.shortage.is_fragmented:
        yield changes.expandable(case, settings)
    yield from _fp8_weights(case, settings)
    if fits(case, settings):
        yield from _least(case, settings)


def _activations(case: Case, settings: EngineSettings) -> Iterator[Group]:
    if case.shortage.is_fragmented:
        yield changes.expandable(case, settings)
    yield _from(changes.fewer_tokens(case, settings), case.repeats)
    yield _from(changes.fewer_sequences(case, settings), case.repeats)
    yield changes.halved_context(case, settings)
    yield from _fp8_weights(case, settings)
    yield from _least(case, settings)


def _disturbed(case: Case, settings: EngineSettings) -> Iterator[Group]:
    yield from _same_again(case, settings)
    # With the cache in bytes nothing is measured that another process could disturb.
    if settings.kv_cache_memory_bytes is None:
        yield changes.cache_in_bytes(case, settings)
    yield from _smaller_cache(case, settings)


def _no_cache_blocks(case: Case, settings: EngineSettings) -> Iterator[Group]:
    yield changes.larger_cache(case, settings)
    yield _smaller_batch(case, settings)
    yield _from(changes.fewer_graphs(case, settings), case.repeats)
    yield _from(changes.fewer_sequences(case, settings), case.repeats)
    yield from _fp8_weights(case, settings)
    yield from _least(case, settings)


def _context_too_long(case: Case, settings: EngineSettings) -> Iterator[Group]:
    yield changes.larger_cache(case, settings)
    tokens = case.shortage.max_model_len
    shorter = [replace(c, check="nothing") for c in changes.shorter_context(case, settings, tokens)]
    is_dear = tokens is not None and tokens < settings.max_model_len * CONTEXT_WORTH_KEEPING
    if is_dear and not case.longest_request_tokens:
        yield changes.fp8_cache(case, settings)
    if tokens is None or tokens >= case.shortest_tokens:
        yield shorter
    yield from _smaller_context(case, settings)
    yield _smaller_batch(case, settings)
    yield from _smaller_context(case, replace(settings, enforce_eager=True))
    yield from _fp8_weights(case, settings)
    yield from _least(case, settings)


def _too_many_sequences(case: Case, settings: EngineSettings) -> Iterator[Group]:
    most = case.shortage.max_num_seqs
    if most is not None and 0 < most < settings.max_num_seqs:
        fewer = replace(settings, max_num_seqs=most)
        yield (Change(name="fewer sequences", settings=fewer, check="nothing"),)
    yield changes.fewer_sequences(case, settings)
    yield from _no_cache_blocks(case, settings)


def _smaller_cache(case: Case, settings: EngineSettings) -> Iterator[Group]:
    if case.shortage.is_fragmented:
        yield changes.expandable(case, settings)
    yield changes.smaller_cache(case, settings, less_bytes(case))
    yield from _beside_smaller_cache(case, settings)
    yield _from(changes.fewer_sequences(case, settings), case.repeats)
    yield from _least(case, settings)


def _graph_capture(case: Case, settings: EngineSettings) -> Iterator[Group]:
    yield _from(changes.fewer_graphs(case, settings), 2 * case.repeats - 1)
    yield from _smaller_cache(case, settings)


def _warm_up(case: Case, settings: EngineSettings) -> Iterator[Group]:
    if case.repeats <= 2:
        yield changes.fewer_sequences(case, settings)
    yield from _smaller_cache(case, settings)


def _unknown(case: Case, settings: EngineSettings) -> Iterator[Group]:
    """As the policy `fixed`, with nothing larger than it is now."""
    model = case.model
    rungs = fixed_ladder(
        model.planned, model.shape, model.device, model.engine, case.longest_request_tokens
    )
    yield tuple(
        Change(name=rung.name, settings=_at_most(rung.settings, settings)) for rung in rungs[1:]
    )
    yield from _smaller_cache(case, settings)


def _same_again(case: Case, settings: EngineSettings) -> Iterator[Group]:
    if may_repeat(case):
        yield (Change(name="the same again", settings=settings, check="nothing"),)


def _with_room(case: Case, group: Group) -> Iterator[Change]:
    """Each with a cache for which the device should have room."""
    for change in group:
        yield from changes.in_the_room(case, change)


def _smaller_batch(case: Case, settings: EngineSettings) -> Iterator[Change]:
    """Fewer tokens, then fewer graphs beside the fewest tokens."""
    fewest = settings
    for change in changes.fewer_tokens(case, settings):
        yield change
        fewest = change.settings
    yield from changes.fewer_graphs(case, fewest)


def _smaller_context(case: Case, settings: EngineSettings) -> Iterator[Group]:
    """What keeps a whole sequence: the longest that should fit, or a cache of half the bytes."""
    found = longest(case, settings)
    if found is not None:
        yield (Change(name="shorter context", settings=found),)
    for change in changes.fp8_cache(case, settings):
        yield _with_room(case, (change,))
        found = longest(case, change.settings)
        if found is not None:
            yield (Change(name="fp8 KV cache, shorter context", settings=found),)
    yield changes.halved_context(case, settings)


def _beside_smaller_cache(case: Case, settings: EngineSettings) -> Iterator[Group]:
    """When it would hold no more than one sequence of this length: what lets it hold one."""
    for smaller in changes.smaller_cache(case, settings, less_bytes(case)):
        batch = _smaller_batch(case, smaller.settings)
        yield tuple(replace(change, check="cache") for change in batch)
        found = longest_held(case, smaller.settings)
        if found is not None:
            yield (Change(name="shorter context", settings=found, check="cache"),)
        cache = (*changes.fp8_cache(case, smaller.settings),)
        yield tuple(replace(change, check="cache") for change in cache)
        halves = changes.halved_context(case, smaller.settings)
        yield tuple(replace(change, check="cache") for change in halves)


def _fp8_weights(case: Case, settings: EngineSettings) -> Iterator[Group]:
    """By themselves, then with what else makes them fit."""
    for change in changes.fp8_weights(case, settings):
        yield _with_room(case, (change,))
        yield _with_room(case, _smaller_batch(case, change.settings))
        yield from _smaller_context(case, change.settings)
        yield _with_room(case, changes.least(case, change.settings))


def _least(case: Case, settings: EngineSettings) -> Iterator[Group]:
    """The last that there is, by itself and in smaller formats."""
    yield _with_room(case, changes.least(case, settings))
    for smaller in (changes.fp8_cache, changes.fp8_weights):
        for change in smaller(case, settings):
            yield _with_room(case, changes.least(case, change.settings))


def _from(found: Iterable[Change], number: int) -> Iterator[Change]:
    """From the n-th on; at least the last. A second death of a kind skips the next half."""
    listed = list(found)
    yield from listed[min(number - 1, max(len(listed) - 1, 0)) :]


def _at_most(smaller: EngineSettings, now: EngineSettings) -> EngineSettings:
    cache_bytes = [s.kv_cache_memory_bytes for s in (smaller, now)]
    return replace(
        now,
        gpu_memory_utilization=min(smaller.gpu_memory_utilization, now.gpu_memory_utilization),
        max_model_len=min(smaller.max_model_len, now.max_model_len),
        kv_cache_memory_bytes=min((size for size in cache_bytes if size is not None), default=None),
    )


_ANSWERS: dict[ShortageKind, Callable[[Case, EngineSettings], Iterator[Group]]] = {
    ShortageKind.NOT_FREE: _not_free,
    ShortageKind.WEIGHTS: _weights,
    ShortageKind.ACTIVATIONS: _activations,
    ShortageKind.DISTURBED: _disturbed,
    ShortageKind.NO_CACHE_BLOCKS: _no_cache_blocks,
    ShortageKind.CONTEXT_TOO_LONG: _context_too_long,
    ShortageKind.TOO_MANY_SEQUENCES: _too_many_sequences,
    ShortageKind.CACHE_ALLOCATION: _smaller_cache,
    ShortageKind.GRAPH_CAPTURE: _graph_capture,
    ShortageKind.WARM_UP: _warm_up,
    ShortageKind.RUN_TIME: _smaller_cache,
    ShortageKind.OUTSIDE_ALLOCATOR: _smaller_cache,
    ShortageKind.UNKNOWN: _unknown,
}
