"""When a degraded replica tries larger settings again. Pure: facts in, a time or a climb out.

What has served is tried after a quiet time, twice as long after each climb that failed. What never
served is tried only when room has come that was not there: the same again would end the same.
"""

from dataclasses import dataclass

# A co-tenant that restarts is gone for a while, too.
SETTLE_S = 60.0
_MOST_DOUBLINGS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes of a card, as an engine that has not started finds them."""

    needed_bytes: int  # by the larger settings, as estimated
    then_bytes: int  # free before the load of the life that now serves
    now_bytes: int  # free, with what this life itself holds

    @property
    def is_enough(self) -> bool:
        return self.needed_bytes <= self.now_bytes

    @property
    def has_come(self) -> bool:
        """Somebody else has left the card: it is enough now, and was not."""
        return self.is_enough and self.needed_bytes > self.then_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A replica that serves with less than was asked for. Times are of the wall clock."""

    has_larger: bool  # there is a step up
    larger_has_served: bool
    quiet_since_s: float  # the last start or death of memory, whichever is later
    failed_climbs: int = 0  # in a row, of any replica of this model
    failed_at_s: float = 0.0
    in_flight: int = 0
    room: Room | None = None  # None: nobody knows
    room_since_s: float | None = None  # since when it has been seen to have come
    is_other_climbing: bool = False


def due_at_s(facts: Facts, heal_after_s: float) -> float | None:
    """The earliest time of the next climb; None while nothing says that there will be one."""
    if not facts.has_larger or (facts.room is not None and not facts.room.is_enough):
        return None
    doublings = min(facts.failed_climbs, _MOST_DOUBLINGS)
    not_before_s = facts.failed_at_s + heal_after_s * 2**doublings if doublings else 0.0
    if facts.room_since_s is not None:
        settled_s = max(facts.quiet_since_s, facts.room_since_s) + min(SETTLE_S, heal_after_s)
        return max(settled_s, not_before_s)
    if not facts.larger_has_served:
        return None
    return max(facts.quiet_since_s + heal_after_s, not_before_s)


def may_climb(facts: Facts, heal_after_s: float, now_s: float) -> bool:
    """Whether to climb now: due, alone in it, and idle or overdue."""
    due_s = due_at_s(facts, heal_after_s)
    if due_s is None or now_s < due_s or facts.is_other_climbing:
        return False
    return not facts.in_flight or now_s >= due_s + heal_after_s
