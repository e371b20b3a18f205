"""What can go wrong while serving, classed by what the caller can do about it."""

from vram.errors import BallastError, Invalid

__all__ = [
    "GONE_RETRY_AFTER_S",
    "BallastError",
    "Busy",
    "EngineDied",
    "EngineMissing",
    "Fatal",
    "Invalid",
    "LadderExhausted",
    "Poison",
    "UnknownEngine",
    "UnknownOption",
]

GONE_RETRY_AFTER_S = 30  # by then Ray Serve has put another replica in the place of a failed one
# vLLM's OpenAI layer passes the text of an error on, and not its class.
POISON_SENTENCE = "This request ends the engine:"


class Busy(BallastError):
    """The replica can't take the request now; the same request may work `retry_after_s` later."""

    def __init__(self, reason: str, retry_after_s: int) -> None:
        super().__init__(reason, retry_after_s)
        self.reason = reason
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.reason}; try again in {self.retry_after_s} s"


class Fatal(BallastError):
    """The replica can't go on; Ray Serve has to replace it."""


class EngineDied(BallastError):
    """The engine's processes are gone. Recoverable: the keeper starts them again."""


class Poison(BallastError):
    """A request that ends the engine; the others are served, this one is not tried again."""

    def __init__(self, model: str, request_id: str, deaths: int, cause: str) -> None:
        super().__init__(model, request_id, deaths, cause)
        self.model = model
        self.request_id = request_id
        self.deaths = deaths
        self.cause = cause

    def __str__(self) -> str:
        return (
            f"{POISON_SENTENCE} {self.deaths} engines of {self.model} died with it in the batch "
            f"(cause: {self.cause}), the last of them with nothing else to blame. It is not tried "
            f"again; a shorter prompt or a smaller max_tokens may work."
        )


class LadderExhausted(Fatal):
    """Every attempt to load or to restart the engine failed; `attempts` says how each one ended."""

    def __init__(self, model: str, reason: str, attempts: tuple[str, ...]) -> None:
        super().__init__(model, reason, attempts)
        self.model = model
        self.reason = reason
        self.attempts = attempts

    def __str__(self) -> str:
        story = "; ".join(f"{number}. {line}" for number, line in enumerate(self.attempts, 1))
        return f"{self.model}: {self.reason} after {len(self.attempts)} attempts: {story}"


class UnknownEngine(Invalid):
    """The configuration names an engine that Ballast does not have."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(name)
        self.args = (name, known)
        self.name = name
        self.known = known

    def __str__(self) -> str:
        return f"unknown engine {self.name!r}; known engines: {', '.join(self.known)}"


class EngineMissing(Invalid):
    """The engine is known, but its package is not installed here."""

    def __init__(self, engine: str, package: str, install: str) -> None:
        super().__init__(engine)
        self.args = (engine, package, install)
        self.engine = engine
        self.package = package
        self.install = install

    def __str__(self) -> str:
        return (
            f"engine {self.engine!r} needs the package {self.package!r}, which is not installed: "
            f"{self.install}"
        )


class UnknownOption(Invalid):
    """`engine_args` has a key that the engine does not take, or that the plan owns."""

    def __init__(self, engine: str, option: str, reason: str) -> None:
        super().__init__(engine, option)
        self.args = (engine, option, reason)
        self.engine = engine
        self.option = option
        self.reason = reason

    def __str__(self) -> str:
        return f"engine_args.{self.option} can't be given to engine {self.engine!r}: {self.reason}"
