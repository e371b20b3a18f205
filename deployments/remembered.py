"""What replicas of a model know of each other: settings that worked, climbs that did not."""

from collections.abc import Callable
from dataclasses import dataclass

from deployments.course import Course
from vram.ladder import Rung
from vram.settings import EngineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """Of one model, card, engine version and plan. Times are of the wall clock."""

    rung: Rung
    path: tuple[Rung, ...]
    since_s: float
    learned_at_s: float
    failed_climbs: int = 0  # in a row
    failed_at_s: float = 0.0

    @classmethod
    def of(
        cls, course: Course, *, at_s: float, failed_climbs: int, failed_at_s: float
    ) -> "Remembered":
        return cls(
            rung=course.rung,
            path=course.path,
            since_s=at_s if course.since_s is None else course.since_s,
            learned_at_s=at_s,
            failed_climbs=failed_climbs,
            failed_at_s=failed_at_s,
        )

    def course(self, asked: Rung, is_permitted: Callable[[EngineSettings], bool]) -> Course | None:
        """Where a new replica starts; None if it is not what the plan and the user allow."""
        if self.rung.settings == asked.settings or not is_permitted(self.rung.settings):
            return None
        path = tuple(rung for rung in self.path if is_permitted(rung.settings))
        return Course(rung=self.rung, asked=asked, path=path, since_s=self.since_s)
