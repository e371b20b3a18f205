"""Everything Ballast says no with, classed by what the caller can do. Knows no HTTP and no Ray.

Errors cross processes, so each hands all its arguments to Exception and builds its sentence in
__str__: they pickle, and they unpickle.
"""

from vram.units import gib


class BallastError(Exception):
    """The root of every error that Ballast raises on purpose."""


class Invalid(BallastError):
    """The request or the configuration has to change; trying again does not help."""

    def __init__(self, problem: str, setting: str = "") -> None:
        super().__init__(problem, setting)
        self.problem = problem
        self.setting = setting

    def __str__(self) -> str:
        return self.problem


class UnknownArchitecture(Invalid):
    """The model is of a kind whose memory we cannot compute, and we do not guess."""

    def __init__(self, architecture: str, missing: str) -> None:
        super().__init__(architecture, missing)
        self.args = (architecture, missing)
        self.architecture = architecture
        self.missing = missing

    def __str__(self) -> str:
        return f"Unknown architecture {self.architecture!r}: {self.missing}"


class UnknownDtype(Invalid):
    """A number format that is not in our tables."""

    def __init__(self, dtype: str, known: str, setting: str = "dtype") -> None:
        super().__init__(dtype, setting)
        self.args = (dtype, known, setting)
        self.dtype = dtype
        self.known = known

    def __str__(self) -> str:
        return f"Unknown {self.setting} {self.dtype!r}; known are {self.known}."


class DoesNotFit(Invalid):
    """The model does not fit: what was asked, needed, available, what would fit, what to turn."""

    def __init__(
        self, asked: str, needed_bytes: int, available_bytes: int, would_fit: str, setting: str
    ) -> None:
        super().__init__(asked, setting)
        self.args = (asked, needed_bytes, available_bytes, would_fit, setting)
        self.asked = asked
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        self.would_fit = would_fit

    def __str__(self) -> str:
        return (
            f"{self.asked} needs {gib(self.needed_bytes)}; "
            f"{gib(self.available_bytes)} are available. {self.would_fit}"
        )
