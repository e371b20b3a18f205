"""What one answer is on the wire, whatever its shape."""

from collections.abc import Sequence
from typing import Protocol

from openai.types import CompletionUsage

from deployments.openai.choice import Piece


class AnswerWriter(Protocol):
    """Writes one answer; pieces of a choice come in their order."""

    def opening(self, num_choices: int) -> bytes:
        """Events that come before any text."""

    def piece(self, piece: Piece) -> bytes:
        """An event with what is new."""

    def usage(self, usage: CompletionUsage) -> bytes:
        """The event that ends a stream which was asked for its usage."""

    def whole(self, pieces: Sequence[Piece], usage: CompletionUsage) -> bytes:
        """All of it as one JSON body."""
