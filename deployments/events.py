"""What happens to an engine, and what is then to be done: the supervisor's two languages."""

from dataclasses import dataclass

from deployments.oom import Death
from vram.settings import EngineSettings

# Events


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Life `generation` of the engine serves."""

    generation: int
    at_s: float
    settings: EngineSettings | None = None  # what it runs with, if the pre-check changed them


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """Life `generation` of the engine is over, or never began."""

    generation: int
    death: Death
    at_s: float
    longest_request_tokens: int = 0
    settings: EngineSettings | None = None  # what it ran with, if the pre-check changed them
    is_of_one_request: bool = False  # on its trial: smaller settings are no answer
    pardon_from: int = 0  # the first life that a request convicted now has ended; 0: no verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiet:
    """Life `generation` serves with less than was asked for, and more may work again."""

    generation: int
    reason: str
    at_s: float


# Effects


@dataclass(frozen=True, slots=True, kw_only=True)
class Reap:
    """End what is left of the last life."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawn:
    """Start life `generation` with these settings."""

    generation: int
    settings: EngineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Hand every request in the journal to life `generation`."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """Tell the clients and fail the health check."""

    reason: str


Effect = Reap | Spawn | Replay | GiveUp
