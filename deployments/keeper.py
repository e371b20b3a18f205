"""Keeps one engine alive: carries out what the supervisor decides, and replays what was in flight.

Sits between an engine and whatever turns its tokens into HTTP. Runs on one event loop.
"""

import asyncio
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import structlog

from deployments import replays, turns
from deployments.admission import WaitingRoom
from deployments.course import Move
from deployments.engines.protocol import Engine, LoadFailed, Step
from deployments.errors import BallastError, EngineDied, LadderExhausted, Poison
from deployments.events import Died, Effect, GiveUp, Quiet, Reap, Replay, Spawn, Started
from deployments.handover import Handover
from deployments.journal import Journal
from deployments.lives import Lives, PreCheck
from deployments.oom import Death
from deployments.quarantine import Blame, Quarantine
from deployments.supervisor import State, Supervisor
from deployments.watchdog import Watched
from vram.settings import EngineSettings

R = TypeVar("R")
log = structlog.get_logger(__name__)
_NOBODY = Blame()
_MOVES = {
    Move.CLIMB: "engine_climbs",
    Move.BACK: "engine_steps_back",
    Move.FORGET: "engine_starts_as_asked",
    Move.REMEMBERED: "engine_starts_as_remembered",
}


class Keeper(Generic[R]):
    """An engine that does not die, seen from above: requests go in, each token comes out once."""

    def __init__(
        self,
        model: str,
        engine: Engine[R],
        supervisor: Supervisor,
        *,
        on_step: Callable[[Step], None],
        on_give_up: Callable[[LadderExhausted], None],
        on_refusal: Callable[[str, BallastError], None] = lambda request_id, error: None,
        before_load: PreCheck | None = None,
        isolation_s: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.model = model
        self.engine = engine
        self.supervisor = supervisor
        self.journal: Journal[R] = Journal()
        self.finished_in = 0  # the newest life that has finished a request
        self._lives = Lives(self.heard_step, self.heard_death, before_load)
        self._quarantine = Quarantine()
        self._handover = Handover(
            engine,
            self.journal,
            self._quarantine,
            isolation_s=isolation_s,
            on_refusal=lambda request_id, error: self._on_refusal(request_id, error),
        )
        self._room = WaitingRoom(model)
        self._on_step = on_step
        self._on_give_up = on_give_up
        self._on_refusal = on_refusal
        self._clock = clock
        self._death: Died | None = None  # heard, not answered yet
        self._recovery: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        return self.supervisor.state

    @property
    def settings(self) -> EngineSettings | None:
        """What the engine was last started with."""
        return self._lives.settings

    @property
    def is_serving(self) -> bool:
        """Ready, and every request that was in flight is with the engine again."""
        return self._room.is_open and self.state is State.READY

    @property
    def num_replayed(self) -> int:
        return self._handover.num_replayed

    @property
    def num_waiting(self) -> int:
        return self._room.num_waiting

    async def start(self) -> None:
        """Load, going down the ladder where memory asks for it. Raises `LadderExhausted`."""
        await self._recover(self.supervisor.begin(self._clock()))
        if self.state is State.FAILED:
            raise self._exhausted()

    async def admission(self, *, wait_s: float, max_waiting: int) -> None:
        """Return when the engine can take a request; raise `Busy` when that takes too long."""
        await self._room.enter(wait_s=wait_s, max_waiting=max_waiting)

    async def generate(
        self, request_id: str, request: R, *, total_tokens: int, emitted: Sequence[int] = ()
    ) -> None:
        """Take a request on; from here on it ends by finishing, by `abort`, or by giving up.

        `emitted` are the tokens that another replica gave before it died.
        """
        if self.state is State.FAILED:
            raise self._exhausted()
        entry = self.journal.admit(request_id, request, total_tokens=total_tokens)
        entry.emitted.extend(emitted)
        replays.note(entry)
        turns.over()
        if not self.is_serving:
            return  # the recovery hands it over with the others
        entry.generation = self.supervisor.generation
        try:
            await self.engine.generate(request, emitted)
        except EngineDied:
            log.info("request_met_a_dying_engine", model=self.model, request_id=request_id)
        except BaseException:
            # Refused, or its client left, when the engine may have it already.
            await self.abort((request_id,))
            raise

    async def abort(self, request_ids: Sequence[str]) -> None:
        """The client left."""
        for request_id in request_ids:
            self.journal.release(request_id)
        self._handover.notice()
        if self.state is State.READY and self._death is None:  # also while it is handed requests
            await self.engine.abort(request_ids)

    async def stop(self) -> None:
        """End the engine for good."""
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.gather(self._recovery, return_exceptions=True)
        await self.engine.stop()

    def heard_step(self, generation: int, step: Step) -> None:
        """Journal first, client second; tokens of a life that is over are nobody's."""
        if generation != self.supervisor.generation:
            return
        for delta in step.outputs:
            self.journal.record(delta.request_id, delta.new_token_ids, finished=delta.finished)
            if delta.finished:
                self.finished_in = generation
        self._on_step(step)
        self._handover.notice()

    def heard_death(self, generation: int, death: Death) -> None:
        """Begin the recovery, once for each life, however many streams notice its end."""
        if generation != self.supervisor.generation or self._death is not None:
            return
        self._close()
        log.warning(
            "engine_died", model=self.model, generation=generation, cause=death.cause.value,
            phase=death.phase, message=death.message, in_flight=len(self.journal),
        )  # fmt: skip
        blame = self._quarantine.blame(
            generation,
            death,
            self.journal.num_emitted(generation),
            in_flight=self.journal.request_ids(),
        )
        self._death = self._died(generation, death, blame)
        self._handover.notice(is_dead=True)
        if blame.convicted is not None:
            self._refuse(blame.convicted, blame, death)
        if self._is_calm:
            self._recover(())

    def climb(self, reason: str) -> bool:
        """Go on with larger settings, with every stream as after a death; False: not now."""
        if not self.is_serving or self._death is not None or not self._is_calm:
            return False
        generation = self.supervisor.generation
        quiet = Quiet(generation=generation, reason=reason, at_s=self._clock())
        effects = self.supervisor.on_event(quiet)
        if not effects:
            return False
        self._close()
        self._recover(effects)
        return True

    def watched(self) -> Watched | None:
        """The life that has to show that it is one; None while there is none."""
        return self._lives.watched(lambda life: len(self.journal.num_emitted(life)))

    def end_life(self, generation: int, death: Death) -> None:
        """A life that stands still is over; what is left of it is reaped as after any death."""
        self._lives.end(generation, death)

    @property
    def _is_calm(self) -> bool:
        return self._recovery is None or self._recovery.done()

    def _close(self) -> None:
        """The present life is over, and whoever comes waits for the next."""
        self._lives.close()
        self._room.close()

    def _recover(self, effects: tuple[Effect, ...]) -> asyncio.Task[None]:
        self._recovery = asyncio.get_running_loop().create_task(self._carry_out(effects))
        return self._recovery

    async def _carry_out(self, effects: tuple[Effect, ...]) -> None:
        """Effects, and the answers to what happens meanwhile, until there is nothing left to do."""
        queue = list(effects)
        try:
            while True:
                while queue:
                    queue.extend(await self._perform(queue.pop(0)))
                death, self._death = self._death, None
                if death is None:
                    return
                queue.extend(self.supervisor.on_event(death))
        except Exception as error:
            # A bug of ours or of the engine's adapter: say so to everyone instead of hanging.
            # Not `log.exception`: it may print local variables, and keys are among them.
            log.error("recovery_failed", model=self.model, error=traceback.format_exc())
            self.supervisor.give_up(f"{type(error).__name__}: {error}")
            self._tell_all()
            raise

    async def _perform(self, effect: Effect) -> tuple[Effect, ...]:
        match effect:
            case Reap():
                await self.engine.stop()
            case Spawn():
                return await self._spawn(effect)
            case Replay():
                await self._replay(effect.generation)
            case GiveUp():
                self._tell_all()
        return ()

    async def _spawn(self, spawn: Spawn) -> tuple[Effect, ...]:
        generation, rung = spawn.generation, self.supervisor.rung
        attempt = self.supervisor.attempts[-1]
        if attempt.reason:
            event = _MOVES.get(attempt.move, "engine_steps_down")
            log.warning(
                event, model=self.model, generation=generation, rung=rung.name,
                price=rung.price, reason=attempt.reason,
            )  # fmt: skip
        try:
            settings = await self._lives.load(generation, spawn.settings, self.engine.start)
        except LoadFailed as failure:
            log.warning(
                "engine_load_failed", model=self.model, generation=generation, rung=rung.name,
                death=str(failure.death),
            )  # fmt: skip
            self._death = None
            return self.supervisor.on_event(self._died(generation, failure.death))
        log.info(
            "engine_started", model=self.model, generation=generation, rung=rung.name,
            price=rung.price, in_flight=len(self.journal),
        )  # fmt: skip
        return self.supervisor.on_event(
            Started(generation=generation, at_s=self._clock(), settings=settings)
        )

    async def _replay(self, generation: int) -> None:
        """Everything in the journal first, then new requests straight through."""
        if await self._handover.replay(generation) and self._death is None:
            self._room.open()

    def _tell_all(self) -> None:
        error = self._exhausted()
        log.error("engine_given_up", model=self.model, error=str(error))
        self.journal.clear()
        self._room.close_for_good()
        self._on_give_up(error)

    def _refuse(self, request_id: str, blame: Blame, death: Death) -> None:
        error = Poison(self.model, request_id, blame.deaths, death.cause.value)
        log.error("request_refused", model=self.model, request_id=request_id, error=str(error))
        self.journal.release(request_id)
        self._on_refusal(request_id, error)

    def _died(self, generation: int, death: Death, blame: Blame = _NOBODY) -> Died:
        return Died(
            generation=generation,
            death=death,
            at_s=self._clock(),
            longest_request_tokens=self.journal.longest_request_tokens,
            settings=self._lives.tried,
            is_of_one_request=blame.is_strike,
            pardon_from=blame.first_generation,
        )

    def _exhausted(self) -> LadderExhausted:
        attempts = tuple(str(attempt) for attempt in self.supervisor.attempts)
        return LadderExhausted(self.model, self.supervisor.reason, attempts)
