"""The policy `diagnose` for a supervisor: its attempts become a case, the answer a rung."""

from dataclasses import replace

from deployments.events import GiveUp
from deployments.history import Attempt
from deployments.oom import Cause
from deployments.policy import Policy
from vram.case import Case, Model, Tried
from vram.diagnose import Exhausted, next_step
from vram.ladder import Rung
from vram.shortage import Shortage, ShortageKind


def diagnose(model: Model) -> Policy:
    """The smallest change that answers what was short, until there is none."""

    def policy(attempts: tuple[Attempt, ...], longest_request_tokens: int) -> Rung | GiveUp:
        tried = tuple(tried for tried in map(_tried, attempts) if tried is not None)
        case = Case(model=model, tried=tried, longest_request_tokens=longest_request_tokens)
        answer = next_step(case)
        if isinstance(answer, Exhausted):
            return GiveUp(reason=answer.reason)
        last = attempts[-1].death
        if tried[-1].shortage is None and last is not None:
            undone = f"{attempts[-1].rung} undone: {last.message}"
            return replace(answer, reason=f"{answer.reason} ({undone})")
        return answer

    return policy


def _tried(attempt: Attempt) -> Tried | None:
    """None for a life that ended of something that no settings answer."""
    death = attempt.death
    if death is None:
        return None
    shortage = None
    if death.is_memory:
        shortage = death.shortage or Shortage(kind=ShortageKind.UNKNOWN)
    elif attempt.started_at_s is not None or death.cause not in (Cause.REFUSED, Cause.OTHER):
        return None
    return Tried(
        asked=attempt.settings,
        settings=attempt.ran_with or attempt.settings,
        shortage=shortage,
    )
