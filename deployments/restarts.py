"""When an engine that ends again and again is given up: restarts are counted here. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartLimit:
    """How many deaths that were not memory are answered by starting again, in how long a time."""

    max_restarts: int
    window_s: float


class Restarts:
    """Of one replica's engine."""

    def __init__(self, limit: RestartLimit) -> None:
        self._limit = limit
        self._at_s: tuple[float, ...] = ()

    def one_more(self, at_s: float, *, num_failed_loads: int) -> str:
        """Count it; what is too much, if anything."""
        recent = tuple(t for t in self._at_s if at_s - t < self._limit.window_s)
        self._at_s = (*recent, at_s)
        if len(recent) >= self._limit.max_restarts:
            return f"more than {self._limit.max_restarts} restarts in {self._limit.window_s:.0f} s"
        # A load that fails after minutes would never be the eleventh of ten minutes.
        if num_failed_loads > self._limit.max_restarts:
            return f"{num_failed_loads} loads in a row have failed"
        return ""
