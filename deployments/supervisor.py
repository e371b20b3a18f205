"""What to do when an engine starts, dies or stays dead. Events in, effects out; no I/O."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from deployments.course import Course, Move
from deployments.events import Died, Effect, GiveUp, Quiet, Reap, Replay, Spawn, Started
from deployments.oom import Cause, Death
from vram.ladder import Rung
from vram.settings import EngineSettings

__all__ = [
    "Attempt",
    "Died",
    "Effect",
    "GiveUp",
    "Policy",
    "Quiet",
    "Reap",
    "Replay",
    "RestartLimit",
    "Spawn",
    "Started",
    "State",
    "Supervisor",
    "fixed",
]


class State(StrEnum):
    """Of a replica's engine, as `/status` and the metrics name it."""

    LOADING = "loading"
    READY = "ready"
    RECOVERING = "recovering"
    FAILED = "failed"


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

    def __str__(self) -> str:
        end = str(self.death) if self.death else "serving" if self.started_at_s else "loading"
        end = "left for larger settings" if self.left_at_s else end
        name = f"{self.rung}, remembered" if self.move is Move.REMEMBERED else self.rung
        return f"{name} ({self.price}): {end}"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartLimit:
    """How many deaths that were not memory are answered by starting again, in how long a time."""

    max_restarts: int
    window_s: float


class Supervisor:
    """The story of one replica's engine, and what to do next in it."""

    def __init__(
        self,
        asked: Rung,
        policy: Policy,
        restart_limit: RestartLimit,
        *,
        remembered: Course | None = None,
        heal_after_s: float = 1800.0,
    ) -> None:
        self.state = State.LOADING
        self.attempts: tuple[Attempt, ...] = ()
        self.reason = ""  # of the last change of state
        self.course = remembered or Course(rung=asked, asked=asked)
        self.failed_climbs = 0  # in a row
        self.failed_at_s = 0.0  # the last of them
        self._courses: tuple[Course, ...] = ()  # of each attempt
        self._quiet_s = heal_after_s  # a life that serves so long has forgotten the deaths before
        self._first_counted = 1  # the first life that the policy still looks at
        self._policy = policy
        self._limit = restart_limit
        self._restarts_at_s: tuple[float, ...] = ()
        self._pardoned: frozenset[int] = frozenset()  # lives that a convicted request has ended

    @property
    def generation(self) -> int:
        return len(self.attempts)

    @property
    def rung(self) -> Rung:
        """The settings in force, or on their way."""
        return self.course.rung

    @property
    def is_cut(self) -> bool:
        """Whether the check before the load left less than the rung has."""
        return self.attempts[-1].ran_with not in (None, self.attempts[-1].settings)

    @property
    def is_degraded(self) -> bool:
        """Whether it serves, or will, with other settings than were asked for."""
        return self.course.is_degraded or self.is_cut

    def begin(self, at_s: float) -> tuple[Effect, ...]:
        """The first load: as asked, or as remembered."""
        if not self.course.is_degraded:
            return self._spawn(at_s)
        return self._spawn(at_s, "remembered: these have served", Move.REMEMBERED)

    def on_event(self, event: Started | Died | Quiet) -> tuple[Effect, ...]:
        """What to do about it. An event of a life that is already over means nothing any more."""
        if event.generation != self.generation or self.state is State.FAILED:
            return ()
        match event:
            case Started():
                self._amend(started_at_s=event.at_s, ran_with=event.settings)
                if self.attempts[-1].move is Move.CLIMB and self.is_cut:
                    self._note_failed_climb(
                        event.at_s
                    )  # it serves, and there was no room after all
                self.state = State.READY
                self.reason = f"serving on rung {self.rung.name}"
                return (Replay(generation=event.generation),)
            case Died():
                return self._on_death(event)
            case Quiet():
                return self._climb(event)

    def has_settled(self, now_s: float) -> bool:
        """Whether the life that serves has done so for a quiet time."""
        last = self.attempts[-1]
        started_s = last.started_at_s
        return started_s is not None and now_s - started_s >= self._quiet_s

    def settle(self) -> None:
        """What was short is past: a climb lasts, and steps are counted anew from this life on."""
        self._first_counted = self.generation
        if self.course.back is not None:
            self.course = self.course.settled()
            self.failed_climbs = self.failed_climbs if self.is_cut else 0

    def _note_failed_climb(self, at_s: float) -> None:
        self.failed_climbs += 1
        self.failed_at_s = at_s

    def _climb(self, event: Quiet) -> tuple[Effect, ...]:
        if self.state is not State.READY:
            return ()
        if self.has_settled(event.at_s):
            self.settle()
        if not self.is_cut and self.course.larger is None:
            return ()
        self._amend(left_at_s=event.at_s)
        self.course = self.course.again() if self.is_cut else self.course.up()
        self.state, self.reason = State.RECOVERING, event.reason
        reap = Reap(generation=event.generation)
        return (reap, *self._spawn(event.at_s, event.reason, Move.CLIMB))

    def _on_death(self, event: Died) -> tuple[Effect, ...]:
        if self.attempts[-1].death is not None:
            return ()
        ran_with = event.settings or self.attempts[-1].settings
        self._amend(died_at_s=event.at_s, death=event.death, ran_with=ran_with)
        reap = Reap(generation=event.generation)
        loading = all(attempt.started_at_s is None for attempt in self.attempts)
        if self.has_settled(event.at_s):
            self.settle()
        step, move = "", Move.SAME
        if event.is_of_one_request:
            step = self._pardon(event.pardon_from)
            move = Move.PARDON if step else move
        elif failed := self._failed_climb(event):
            step, move = failed, Move.BACK
        elif event.death.is_memory or self._refuses_a_step(event.death):
            answer = self._policy(self._counted(), event.longest_request_tokens)
            if not isinstance(answer, GiveUp):
                has_served = self.attempts[-1].started_at_s is not None
                self.course = self.course.down(answer, has_served=has_served, at_s=event.at_s)
                step, move = answer.reason, Move.DOWN
            elif self._is_only_memory:
                step, move = self._forget(), Move.FORGET
            elif self.attempts[-1].started_at_s is None:
                return (reap, self._give_up(answer.reason))
            # It has served with these: one request may be to blame, which the next death shows.
            elif crash_loop := self._crash_loop(event.at_s):
                return (reap, self._give_up(f"{answer.reason}, and {crash_loop}"))
        elif loading and event.death.cause in (Cause.OTHER, Cause.REFUSED):
            if self._is_only_memory:
                return (reap, *self._spawn(event.at_s, self._forget(), Move.FORGET))
            return (reap, self._give_up("it can't be loaded"))  # the same again would end the same
        elif crash_loop := self._crash_loop(event.at_s):
            return (reap, self._give_up(crash_loop))
        self.state = State.LOADING if loading else State.RECOVERING
        self.reason = str(event.death)
        return (reap, *self._spawn(event.at_s, step, move))

    def _counted(self) -> tuple[Attempt, ...]:
        """The lives that say what is too much: not before a quiet time, not of a convicted."""
        return tuple(
            attempt
            for attempt in self.attempts[self._first_counted - 1 :]
            if attempt.generation not in self._pardoned and attempt.death is not None
        )

    def _failed_climb(self, event: Died) -> str:
        """Back to what served before, if it is the climb that ended this life; else nothing."""
        back = self.course.back
        is_loading = self.attempts[-1].started_at_s is None
        if back is None or not (event.death.is_memory or is_loading):
            return ""
        if event.longest_request_tokens > back.rung.settings.max_model_len:
            return ""  # somebody was let in meanwhile who has to be replayed
        self.course = back
        self._note_failed_climb(event.at_s)
        # It is no step down: what the climb died of says nothing of the settings before it.
        self._pardoned |= {self.generation}
        return f"the climb failed: {event.death}"

    @property
    def _is_only_memory(self) -> bool:
        """Whether nothing has served, and what was asked for has not been tried."""
        asked = self.course.asked.settings
        return all(a.started_at_s is None and a.settings != asked for a in self.attempts)

    def _forget(self) -> str:
        """What was remembered must not keep a model from starting as if nothing were."""
        self.course = Course(rung=self.course.asked, asked=self.course.asked)
        self._first_counted = self.generation + 1
        return "what was remembered does not work: as asked"

    def _refuses_a_step(self, death: Death) -> bool:
        """Whether it is the settings of the last step that could not be loaded, not the model."""
        *earlier, last = self.attempts
        if last.started_at_s is not None or death.cause not in (Cause.REFUSED, Cause.OTHER):
            return False
        same = [a for a in earlier if a.settings == last.settings]
        return bool(earlier) and not same and earlier[-1].death is not None

    def _pardon(self, first_generation: int) -> str:
        """The steps since were for a request that is gone: back to the settings before them."""
        if not first_generation:
            return ""
        self.course = self._courses[first_generation - 1]
        self._pardoned |= frozenset(range(first_generation, self.generation + 1))
        return "the request that ended the engine is refused"

    def _crash_loop(self, at_s: float) -> str:
        """What is too much, if anything; a restart is counted otherwise."""
        recent = tuple(t for t in self._restarts_at_s if at_s - t < self._limit.window_s)
        self._restarts_at_s = (*recent, at_s)
        # A load that fails after minutes would never be the eleventh of ten minutes.
        served = (
            attempt.generation for attempt in self.attempts if attempt.started_at_s is not None
        )
        num_failed_loads = self.generation - max(served, default=0)
        if len(recent) >= self._limit.max_restarts:
            return f"more than {self._limit.max_restarts} restarts in {self._limit.window_s:.0f} s"
        if num_failed_loads > self._limit.max_restarts:
            return f"{num_failed_loads} loads in a row have failed"
        return ""

    def _spawn(self, at_s: float, step: str = "", move: Move = Move.SAME) -> tuple[Effect, ...]:
        attempt = Attempt(
            generation=self.generation + 1,
            rung=self.rung.name,
            price=self.rung.price,
            settings=self.rung.settings,
            spawned_at_s=at_s,
            reason=step,
            move=move,
        )
        self._courses = (*self._courses, self.course)
        self.attempts = (*self.attempts, attempt)
        return (Spawn(generation=attempt.generation, settings=attempt.settings),)

    def _give_up(self, reason: str) -> GiveUp:
        self.state = State.FAILED
        self.reason = reason
        return GiveUp(reason=reason)

    def _amend(self, **changes: object) -> None:
        self.attempts = (*self.attempts[:-1], replace(self.attempts[-1], **changes))  # type: ignore[arg-type]
