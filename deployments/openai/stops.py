"""Ends a text before a stop string, however the string is split over the pieces that come."""

from collections.abc import Sequence


class StopScanner:
    """Holds back what may be the beginning of a stop string until that is decided.

    The stop string that is complete first counts; of two that end together, the longer one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: str | None = None
        self._stops = tuple(stops)
        self._max_held_chars = max(len(stop) for stop in stops) - 1
        self._held = ""

    def feed(self, text: str) -> str:
        """What can be given out now; nothing more once a stop string was found."""
        if self.found is not None:
            return ""
        text = self._held + text
        matches = [
            (at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0
        ]
        if matches:
            _, at, self.found = min(matches)
            self._held = ""
            return text[:at]
        at = self._possible_beginning(text)
        self._held = text[at:]
        return text[:at]

    def flush(self) -> str:
        """The text is over: what was held back is text after all."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        for at in range(max(0, len(text) - self._max_held_chars), len(text)):
            if any(stop.startswith(text[at:]) for stop in self._stops):
                return at
        return len(text)
