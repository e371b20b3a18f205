"""Whether an engine that is not dead is alive: stopped, silent or loading for too long. Pure.

Facts in, verdict out; the time is a fact. Who finds the facts and acts on it is `watcher`.
"""

from dataclasses import dataclass

from deployments.oom import Cause, Death


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long each of them may last."""

    stopped_s: float
    stall_s: float
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What the keeper knows of the life that now runs. Times are of the monotonic clock."""

    generation: int
    heard_at_s: float  # its last step; before that, its start
    is_loading: bool = False
    num_running: int = 0  # requests that it was handed and has not finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A life of the engine at one moment."""

    at_s: float
    life: Watched
    stopped: frozenset[tuple[int, str]] = frozenset()  # (id, name) of processes in state T


class Watchdog:
    """Looks again and again, and remembers since when it has seen what it sees."""

    def __init__(self, patience: Patience, *, tick_s: float) -> None:
        self._patience = patience
        self._tick_s = tick_s
        self._last: Facts | None = None
        self._quiet_since_s = 0.0  # no earlier can a silence have begun
        self._stopped_since_s: dict[tuple[int, str], float] = {}

    def look(self, facts: Facts) -> Death | None:
        """The death that this life is to be given, if any."""
        if self._was_blind(facts):
            self._quiet_since_s = facts.at_s
            self._stopped_since_s = {}
        elif not facts.life.num_running and not facts.life.is_loading:
            self._quiet_since_s = facts.at_s
        self._last = facts
        self._stopped_since_s = {
            process: self._stopped_since_s.get(process, facts.at_s) for process in facts.stopped
        }
        phase = "loading" if facts.life.is_loading else "running"
        message = self._stopped(facts) or self._silent(facts)
        return Death(cause=Cause.STALLED, phase=phase, message=message) if message else None

    def _was_blind(self, facts: Facts) -> bool:
        """Another life, or the replica itself stood still: what happened meanwhile is not known."""
        last, life = self._last, facts.life
        if last is None:
            return True
        is_another = last.life.generation != life.generation
        was_loading = last.life.is_loading != life.is_loading
        return is_another or was_loading or facts.at_s - last.at_s > 3 * self._tick_s + 1

    def _stopped(self, facts: Facts) -> str:
        for (process_id, name), since_s in self._stopped_since_s.items():
            stopped_s = facts.at_s - since_s
            if stopped_s >= self._patience.stopped_s:
                return (
                    f"{name} (process {process_id}) has been stopped, as by signal 19, for "
                    f"{stopped_s:.0f} s (recovery.stopped_s)"
                )
        return ""

    def _silent(self, facts: Facts) -> str:
        life = facts.life
        silent_s = facts.at_s - max(life.heard_at_s, self._quiet_since_s)
        if life.is_loading:
            if silent_s < self._patience.load_s:
                return ""
            return f"it has been loading for {silent_s:.0f} s (recovery.load_s)"
        if not life.num_running or silent_s < self._patience.stall_s:
            return ""
        return (
            f"it has {life.num_running} requests and took no step for {silent_s:.0f} s "
            f"(recovery.stall_s)"
        )
