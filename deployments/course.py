"""Where a model stands between what was asked for and what works: down, up, and back. Pure.

Knows no engine and no time of its own.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from vram.ladder import Rung


class Move(StrEnum):
    """How the settings of a life came from those before."""

    SAME = "same"
    DOWN = "down"
    CLIMB = "climb"
    BACK = "back"  # from a climb that failed
    REMEMBERED = "remembered"
    FORGET = "forget"  # from what was remembered and did not work
    PARDON = "pardon"  # the steps were for a request that is refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The rung in force, and those that it was left for."""

    rung: Rung
    asked: Rung
    path: tuple[Rung, ...] = ()  # that have served and were left for smaller ones, largest first
    since_s: float | None = None  # when the settings as asked were left
    back: "Course | None" = None  # while a climb has not shown that it lasts: where it came from

    @property
    def is_degraded(self) -> bool:
        return self.rung.settings != self.asked.settings

    @property
    def larger(self) -> Rung | None:
        """One step up: the last that served; else what was asked for; None at the top."""
        if self.path:
            return self.path[-1]
        return self.asked if self.is_degraded else None

    @property
    def larger_has_served(self) -> bool:
        return bool(self.path)

    def down(self, to: Rung, *, has_served: bool, at_s: float) -> "Course":
        """After a death: what never served is not on the way back. A step back shortens it."""
        left = (*self.path, self.rung) if has_served else self.path
        known = [rung.settings for rung in left]
        if to.settings in known:
            left = left[: known.index(to.settings)]
        if to.settings == self.asked.settings:
            return Course(rung=to, asked=self.asked)
        since_s = self.since_s if self.is_degraded else at_s
        return Course(rung=to, asked=self.asked, path=left, since_s=since_s)

    def up(self) -> "Course":
        """One step; at the top, the same once more."""
        back = replace(self, back=None)
        larger = self.larger or self.rung
        if larger.settings == self.asked.settings:
            return Course(rung=larger, asked=self.asked, back=back)
        return replace(self, rung=larger, path=self.path[:-1], back=back)

    def again(self) -> "Course":
        """The same settings, of which the check before the load may now leave more."""
        return replace(self, back=replace(self, back=None))

    def settled(self) -> "Course":
        """A climb has shown that it lasts."""
        return replace(self, back=None)
