"""The lives of one replica's engine, in their order, and what can be read from them. Pure."""

from dataclasses import dataclass, replace
from typing import Any

from deployments.course import Course, Move
from deployments.oom import Cause, Death
from vram.settings import EngineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One life of the engine, for the history in `/status`."""

    generation: int
    rung: str
    price: str
    settings: EngineSettings  # that the policy asked for
    spawned_at_s: float
    reason: str = ""  # of the step that led here
    move: Move = Move.SAME
    ran_with: EngineSettings | None = None  # known when it has started or died
    started_at_s: float | None = None
    died_at_s: float | None = None
    death: Death | None = None
    left_at_s: float | None = None  # alive, for larger settings

    @property
    def has_started(self) -> bool:
        return self.started_at_s is not None

    @property
    def is_cut(self) -> bool:
        """Whether the check before the load left less than the rung has."""
        return self.ran_with not in (None, self.settings)

    def __str__(self) -> str:
        end = str(self.death) if self.death else "serving" if self.started_at_s else "loading"
        end = "left for larger settings" if self.left_at_s else end
        name = f"{self.rung}, remembered" if self.move is Move.REMEMBERED else self.rung
        return f"{name} ({self.price}): {end}"


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Every attempt with the course that it was on. A new fact makes a new history."""

    attempts: tuple[Attempt, ...] = ()
    courses: tuple[Course, ...] = ()  # of each attempt
    first_counted: int = 1  # the first life that says what is too much
    pardoned: frozenset[int] = frozenset()  # lives that say nothing of their settings

    @property
    def generation(self) -> int:
        return len(self.attempts)

    @property
    def last(self) -> Attempt:
        return self.attempts[-1]

    @property
    def has_served(self) -> bool:
        """Whether any life has started."""
        return any(attempt.has_started for attempt in self.attempts)

    @property
    def num_failed_loads(self) -> int:
        """In a row, up to now."""
        started = (attempt.generation for attempt in self.attempts if attempt.has_started)
        return self.generation - max(started, default=0)

    @property
    def counted(self) -> tuple[Attempt, ...]:
        """The lives that say what is too much: not before a quiet time, not of a convicted."""
        return tuple(
            attempt
            for attempt in self.attempts[self.first_counted - 1 :]
            if attempt.generation not in self.pardoned and attempt.death is not None
        )

    def is_only_memory(self, asked: EngineSettings) -> bool:
        """Whether nothing has served, and what was asked for has not been tried."""
        return not self.has_served and all(a.settings != asked for a in self.attempts)

    def refuses_a_step(self) -> bool:
        """Whether it is the settings of the last step that could not be loaded, not the model."""
        *earlier, last = self.attempts
        cause = None if last.death is None else last.death.cause
        if last.has_started or cause not in (Cause.REFUSED, Cause.OTHER):
            return False
        same = [attempt for attempt in earlier if attempt.settings == last.settings]
        return bool(earlier) and not same and earlier[-1].death is not None

    def begun(self, attempt: Attempt, course: Course) -> "History":
        return replace(self, attempts=(*self.attempts, attempt), courses=(*self.courses, course))

    def amended(self, **changes: Any) -> "History":
        """More is known of the last life."""
        return replace(self, attempts=(*self.attempts[:-1], replace(self.last, **changes)))

    def counted_from(self, generation: int) -> "History":
        """What was before says nothing any more."""
        return replace(self, first_counted=generation)

    def pardoning(self, first_generation: int) -> "History":
        """From this life to the last, none died of its settings."""
        lives = range(first_generation, self.generation + 1)
        return replace(self, pardoned=self.pardoned | frozenset(lives))
