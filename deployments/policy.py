"""What to go on with after memory ran out: what a supervisor asks, and the policy `fixed`. Pure.

The policy `diagnose` is in `diagnosis`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from deployments.events import GiveUp
from deployments.history import Attempt
from vram.ladder import Rung


class Policy(Protocol):
    """What to go on with after memory ran out, or after the engine refused a step of ours.

    The last attempt is the one that has just died.
    """

    def __call__(
        self, attempts: tuple[Attempt, ...], longest_request_tokens: int
    ) -> Rung | GiveUp: ...


def fixed(ladder: Callable[[int], tuple[Rung, ...]]) -> Policy:
    """Down a list that is known beforehand, one rung a memory death, whatever the cause.

    `ladder` makes the rungs, given the longest request in flight, first the user's own settings.
    Rungs that can't work are in the list with their reason and are passed over.
    """

    def policy(attempts: tuple[Attempt, ...], longest_request_tokens: int) -> Rung | GiveUp:
        rungs = ladder(longest_request_tokens)
        names = [rung.name for rung in rungs]
        used = (attempt.rung for attempt in attempts)
        last = max((names.index(name) for name in used if name in names), default=-1)
        left = rungs[last + 1 :]
        found = next((rung for rung in left if rung.skipped_reason is None), None)
        passed = left[: len(left) if found is None else left.index(found)]
        skipped = "; ".join(f"{rung.name} is skipped: {rung.skipped_reason}" for rung in passed)
        if found is None:
            problem = "no smaller settings are left"
            return GiveUp(reason=f"{problem} ({skipped})" if skipped else problem)
        return replace(found, reason=skipped or "memory ran out")

    return policy
