"""Whether settings can work, by the estimate as the deaths so far have corrected it."""

import math
from dataclasses import dataclass, replace

from vram.budget import longest_context
from vram.case import Case, Tried
from vram.engines import FILL_THEIR_BUDGET
from vram.errors import Invalid
from vram.estimate import Estimate, estimate
from vram.settings import EngineSettings
from vram.shortage import Shortage, ShortageKind
from vram.shortfall import STATES_DO_NOT_FIT

# How far below the truth nothing is: a load is tried if it works with the estimate less this part.
# The worst of the recorded loads is within 10 % (docs/memory.md).
TOLERANCE = 0.10
# Shares of steps are finer than those of plans: a hundredth of an H200 is 1.4 GiB.
SHARE_STEPS = 1000


def estimated(case: Case, settings: EngineSettings) -> Estimate:
    """By the estimate alone; raises Invalid."""
    model = case.model
    return estimate(model.shape, settings, model.device, model.engine)


def hidden_bytes(case: Case) -> int:
    """What the engine should hold beyond the estimate, by its errors so far; may be negative.

    Both errors come after everything but the cache was measured. One says how much was left for the
    cache; the other only that nothing was, which is a lower bound.
    """
    told = _told(case)
    known = any(one.is_exact for one in told)
    return max([one.bytes for one in told] + ([] if known else [0]))


def fits(case: Case, settings: EngineSettings) -> bool:
    """Whether it should work."""
    return holds(case, settings) and over_bytes(case, settings) <= 0


def may_fit(case: Case, settings: EngineSettings) -> bool:
    """Whether it could work if the estimate is too high as far as nothing said otherwise."""
    return may_hold(case, settings) and least_over_bytes(case, settings) <= 0


def over_bytes(case: Case, settings: EngineSettings) -> int:
    """By how much the device should be too small; negative is room."""
    return _under_load_bytes(case, settings, hidden_bytes(case)) - free_limit_bytes(case)


def least_over_bytes(case: Case, settings: EngineSettings) -> int:
    """The same, as `may_fit`."""
    more_bytes = _least_hidden_bytes(case, settings)
    found = estimated(case, settings)
    uncounted_bytes = max(found.device_use_under_load_bytes - found.budget_bytes, 0)
    over = _under_load_bytes(case, settings, more_bytes) - free_limit_bytes(case)
    return over - int(TOLERANCE * uncounted_bytes)


def holds(case: Case, settings: EngineSettings) -> bool:
    """Whether the cache should hold one sequence; says nothing of the device as a whole."""
    return _holds(case, settings, hidden_bytes(case))


def may_hold(case: Case, settings: EngineSettings) -> bool:
    """Whether it could, as `may_fit`."""
    return _holds(case, settings, _least_hidden_bytes(case, settings))


def with_room(
    case: Case, settings: EngineSettings, *, optimistic: bool = False
) -> EngineSettings | None:
    """With a cache so much smaller that the device should have room; None where none is left."""
    try:
        less_bytes = (least_over_bytes if optimistic else over_bytes)(case, settings)
    except Invalid:
        return None
    return settings if less_bytes <= 0 else _with_less(case, settings, less_bytes)


def longest(case: Case, settings: EngineSettings) -> EngineSettings | None:
    """With the longest context that should work, not below the floor; None for none."""

    def fitted(changed: EngineSettings) -> EngineSettings | None:
        found = with_room(case, changed)
        return found if found is not None and fits(case, found) else None

    return longest_context(settings, fitted, case.shortest_tokens)


def longest_held(case: Case, settings: EngineSettings) -> EngineSettings | None:
    """With the longest context of which the cache, as it is, should hold a sequence."""
    return longest_context(settings, lambda s: s if holds(case, s) else None, case.shortest_tokens)


def free_limit_bytes(case: Case) -> int:
    """This model's share of the device, less where somebody else was seen to hold some of it."""
    model = case.model
    context = [i.bytes for i in estimated(case, model.planned).outside if i.name == "context"]
    seen = [
        free_bytes + sum(context)  # an engine looks when its own is there
        for tried in case.tried
        if (free_bytes := seen_free_bytes(case, tried.shortage)) is not None
    ]
    return min([model.limit_bytes, *seen[-1:]])


def seen_free_bytes(case: Case, shortage: Shortage | None) -> int | None:
    """What was free at a start; None where it was not the share that was asked for.

    What fails before the share is looked at is small: a context, a workspace. How much the next
    start finds is then for the check before it to say.
    """
    if shortage is None or shortage.kind is not ShortageKind.NOT_FREE:
        return None
    asked_bytes = shortage.asked_bytes
    if asked_bytes is not None and asked_bytes < case.model.device.total_bytes // 100:
        return None
    return shortage.free_bytes


def _with_less(case: Case, settings: EngineSettings, less_bytes: int) -> EngineSettings | None:
    cache_bytes = settings.kv_cache_memory_bytes
    if cache_bytes is not None:
        left_bytes = cache_bytes - less_bytes
        return replace(settings, kv_cache_memory_bytes=left_bytes) if left_bytes > 0 else None
    share = settings.gpu_memory_utilization - less_bytes / case.model.device.total_bytes
    share = math.floor(share * SHARE_STEPS) / SHARE_STEPS
    return replace(settings, gpu_memory_utilization=share) if share > 0 else None


def _holds(case: Case, settings: EngineSettings, more_bytes: int) -> bool:
    found = _corrected(case, settings, more_bytes)
    if found is None:
        return False
    states_fit = not found.reason.startswith(STATES_DO_NOT_FIT)
    return states_fit and found.item("kv_cache").bytes >= found.sequence_bytes


def _corrected(case: Case, settings: EngineSettings, more_bytes: int) -> Estimate | None:
    """With what the share leaves for the cache beside `more_bytes`; None for nothing."""
    try:
        found = estimated(case, settings)
        if settings.kv_cache_memory_bytes is not None:
            return found
        cache_bytes = found.cache_left_bytes - more_bytes
        if case.model.engine not in FILL_THEIR_BUDGET:
            cache_bytes = min(cache_bytes, found.item("kv_cache").bytes)
        if cache_bytes <= 0:
            return None
        return estimated(case, replace(settings, kv_cache_memory_bytes=cache_bytes))
    except Invalid:
        return None


def _under_load_bytes(case: Case, settings: EngineSettings, more_bytes: int) -> int:
    """An engine that fills its share caches less for what the estimate does not know of."""
    found = _corrected(case, settings, more_bytes) or estimated(case, settings)
    return found.device_use_under_load_bytes + more_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What one error says: bytes beyond the estimate, or at least so many."""

    bytes: int
    is_exact: bool
    fixed_bytes: int  # of the estimate then


def _told(case: Case) -> tuple[_Told, ...]:
    """The latest exact one and every bound."""
    told = [found for tried in case.tried if (found := _told_by(case, tried)) is not None]
    exact = [one for one in told if one.is_exact]
    return (*exact[-1:], *(one for one in told if not one.is_exact))


def _told_by(case: Case, tried: Tried) -> _Told | None:
    shortage, settings = tried.shortage, tried.settings
    if (
        shortage is None
        or settings.kv_cache_memory_bytes is not None
        or settings.quantization != case.settings.quantization
        or case.model.engine not in FILL_THEIR_BUDGET
    ):
        return None
    left_bytes = 0
    if shortage.kind is ShortageKind.CONTEXT_TOO_LONG and shortage.free_bytes is not None:
        left_bytes = shortage.free_bytes
    elif shortage.kind is not ShortageKind.NO_CACHE_BLOCKS:
        return None
    found = estimated(case, settings)
    return _Told(
        bytes=found.cache_left_bytes - left_bytes,
        is_exact=left_bytes > 0,
        fixed_bytes=found.fixed_bytes,
    )


def _least_hidden_bytes(case: Case, settings: EngineSettings) -> int:
    """As `hidden_bytes`, and what nobody has told less by the tolerance."""
    try:
        found = estimated(case, settings)
    except Invalid:
        return 0
    told = _told(case)
    unknown_bytes = found.device_use_under_load_bytes - found.item("kv_cache").bytes
    if not told:
        return -int(TOLERANCE * unknown_bytes)
    exact = [one for one in told if one.is_exact]
    if exact:
        unknown_bytes = abs(found.fixed_bytes - exact[0].fixed_bytes)
    least_bytes = (exact[0].bytes if exact else 0) - int(TOLERANCE * unknown_bytes)
    changed_bytes = (int(TOLERANCE * abs(found.fixed_bytes - one.fixed_bytes)) for one in told)
    bounds = [one.bytes - less for one, less in zip(told, changed_bytes, strict=True)]
    return max(least_bytes, *bounds)
