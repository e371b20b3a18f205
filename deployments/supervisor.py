"""What to do when an engine starts, dies or stays dead. Events in, effects out; no I/O."""

from dataclasses import dataclass
from enum import StrEnum

from deployments.course import Course, Move
from deployments.events import Died, Effect, GiveUp, Quiet, Reap, Replay, Spawn, Started
from deployments.history import Attempt, History
from deployments.oom import Cause
from deployments.policy import Policy
from deployments.restarts import RestartLimit, Restarts
from vram.ladder import Rung


class State(StrEnum):
    """Of a replica's engine, as `/status` and the metrics name it."""

    LOADING = "loading"
    READY = "ready"
    RECOVERING = "recovering"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Start:
    """The next life is to start, on the course as it now is, and how it came to that."""

    move: Move = Move.SAME
    reason: str = ""


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
        self.reason = ""  # of the last change of state
        self.course = remembered or Course(rung=asked, asked=asked)
        self.failed_climbs = 0  # in a row
        self.failed_at_s = 0.0  # the last of them
        self._history = History()
        self._quiet_s = heal_after_s  # a life that serves so long has forgotten the deaths before
        self._policy = policy
        self._restarts = Restarts(restart_limit)

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        return self._history.attempts

    @property
    def generation(self) -> int:
        return self._history.generation

    @property
    def rung(self) -> Rung:
        """The settings in force, or on their way."""
        return self.course.rung

    @property
    def is_cut(self) -> bool:
        """Whether the check before the load left less than the rung has."""
        return self._history.last.is_cut

    @property
    def is_degraded(self) -> bool:
        """Whether it serves, or will, with other settings than were asked for."""
        return self.course.is_degraded or self.is_cut

    def begin(self, at_s: float) -> tuple[Effect, ...]:
        """The first load: as asked, or as remembered."""
        if not self.course.is_degraded:
            return self._spawn(at_s, Start())
        return self._spawn(at_s, Start(Move.REMEMBERED, "remembered: these have served"))

    def on_event(self, event: Started | Died | Quiet) -> tuple[Effect, ...]:
        """What to do about it. An event of a life that is already over means nothing any more."""
        if event.generation != self.generation or self.state is State.FAILED:
            return ()
        match event:
            case Started():
                return self._on_start(event)
            case Died():
                return self._on_death(event)
            case Quiet():
                return self._climb(event)

    def has_settled(self, now_s: float) -> bool:
        """Whether the life that serves has done so for a quiet time."""
        started_s = self._history.last.started_at_s
        return started_s is not None and now_s - started_s >= self._quiet_s

    def settle(self) -> None:
        """What was short is past: a climb lasts, and steps are counted anew from this life on."""
        self._history = self._history.counted_from(self.generation)
        if self.course.back is not None:
            self.course = self.course.settled()
            self.failed_climbs = self.failed_climbs if self.is_cut else 0

    def give_up(self, reason: str) -> GiveUp:
        """For good: no event is answered any more."""
        self.state, self.reason = State.FAILED, reason
        return GiveUp(reason=reason)

    def _on_start(self, event: Started) -> tuple[Effect, ...]:
        self._history = self._history.amended(started_at_s=event.at_s, ran_with=event.settings)
        if self._history.last.move is Move.CLIMB and self.is_cut:
            self._note_failed_climb(event.at_s)  # it serves, and there was no room after all
        self.state, self.reason = State.READY, f"serving on rung {self.rung.name}"
        return (Replay(generation=event.generation),)

    def _climb(self, event: Quiet) -> tuple[Effect, ...]:
        if self.state is not State.READY:
            return ()
        if self.has_settled(event.at_s):
            self.settle()
        if not self.is_cut and self.course.larger is None:
            return ()
        self._history = self._history.amended(left_at_s=event.at_s)
        self.course = self.course.again() if self.is_cut else self.course.up()
        self.state, self.reason = State.RECOVERING, event.reason
        reap = Reap(generation=event.generation)
        return (reap, *self._spawn(event.at_s, Start(Move.CLIMB, event.reason)))

    def _on_death(self, event: Died) -> tuple[Effect, ...]:
        last = self._history.last
        if last.death is not None:
            return ()
        ran_with = event.settings or last.settings
        self._history = self._history.amended(
            died_at_s=event.at_s, death=event.death, ran_with=ran_with
        )
        if self.has_settled(event.at_s):
            self.settle()
        reap = Reap(generation=event.generation)
        answer = self._answer(event)
        if isinstance(answer, GiveUp):
            return (reap, self.give_up(answer.reason))
        self.state = State.RECOVERING if self._history.has_served else State.LOADING
        self.reason = str(event.death)
        return (reap, *self._spawn(event.at_s, answer))

    def _answer(self, event: Died) -> Start | GiveUp:
        """To whom or what the death is put down, and what follows; moves the course."""
        if event.is_of_one_request:
            return self._pardon(event.pardon_from)
        if self._is_failed_climb(event):
            return self._step_back(event)
        if event.death.is_memory or self._history.refuses_a_step():
            return self._step_down(event)
        cannot_load = event.death.cause in (Cause.OTHER, Cause.REFUSED)
        if cannot_load and not self._history.has_served:
            # The same again would end the same.
            return self._forget() if self._is_only_memory else GiveUp(reason="it can't be loaded")
        crash_loop = self._crash_loop(event.at_s)
        return GiveUp(reason=crash_loop) if crash_loop else Start()

    def _pardon(self, first_generation: int) -> Start:
        """The steps since were for a request that is gone: back to the settings before them."""
        if not first_generation:
            return Start()
        self.course = self._history.courses[first_generation - 1]
        self._history = self._history.pardoning(first_generation)
        return Start(Move.PARDON, "the request that ended the engine is refused")

    def _is_failed_climb(self, event: Died) -> bool:
        """Whether it is the climb that ended this life, and there is a way back."""
        back = self.course.back
        if back is None or not (event.death.is_memory or not self._history.last.has_started):
            return False
        # Somebody may have been let in meanwhile who has to be replayed.
        return event.longest_request_tokens <= back.rung.settings.max_model_len

    def _step_back(self, event: Died) -> Start:
        """To what served before the climb."""
        assert self.course.back is not None
        self.course = self.course.back
        self._note_failed_climb(event.at_s)
        # It is no step down: what the climb died of says nothing of the settings before it.
        self._history = self._history.pardoning(self.generation)
        return Start(Move.BACK, f"the climb failed: {event.death}")

    def _step_down(self, event: Died) -> Start | GiveUp:
        """As the policy says; where it has no answer, what else there is."""
        has_started = self._history.last.has_started
        answer = self._policy(self._history.counted, event.longest_request_tokens)
        if not isinstance(answer, GiveUp):
            self.course = self.course.down(answer, has_served=has_started, at_s=event.at_s)
            return Start(Move.DOWN, answer.reason)
        if self._is_only_memory:
            return self._forget()
        if not has_started:
            return answer
        # It has served with these: one request may be to blame, which the next death shows.
        crash_loop = self._crash_loop(event.at_s)
        return GiveUp(reason=f"{answer.reason}, and {crash_loop}") if crash_loop else Start()

    @property
    def _is_only_memory(self) -> bool:
        return self._history.is_only_memory(self.course.asked.settings)

    def _forget(self) -> Start:
        """What was remembered must not keep a model from starting as if nothing were."""
        self.course = Course(rung=self.course.asked, asked=self.course.asked)
        self._history = self._history.counted_from(self.generation + 1)
        return Start(Move.FORGET, "what was remembered does not work: as asked")

    def _crash_loop(self, at_s: float) -> str:
        return self._restarts.one_more(at_s, num_failed_loads=self._history.num_failed_loads)

    def _note_failed_climb(self, at_s: float) -> None:
        self.failed_climbs += 1
        self.failed_at_s = at_s

    def _spawn(self, at_s: float, start: Start) -> tuple[Effect, ...]:
        attempt = Attempt(
            generation=self.generation + 1,
            rung=self.rung.name,
            price=self.rung.price,
            settings=self.rung.settings,
            spawned_at_s=at_s,
            reason=start.reason,
            move=start.move,
        )
        self._history = self._history.begun(attempt, self.course)
        return (Spawn(generation=attempt.generation, settings=attempt.settings),)
