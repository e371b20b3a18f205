"""Text out of tokens as they come. Knows neither stop strings nor HTTP."""

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"  # what decoders write for bytes that are not a character (yet)
CONTEXT_TOKENS = 8  # of the prompt: decides whether the first word begins with its space
MAX_HELD_TOKENS = 32  # a character has at most 4 bytes: longer than that, it is garbage
KEPT_TOKENS = 8  # more than the tokens that one incomplete character can lie in


class Detokenizer:
    """Gives out each character once, when its last byte is there.

    Decodes a short window of tokens again at each step and gives out what is new at its end: a
    token's text may depend on the token before it, and a character may need up to four tokens.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        self._window = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._num_settled = len(self._window)  # tokens of the window that are only context now
        self._num_shown = len(_complete(decode(self._window)))  # characters that are out already

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        self._window.extend(token_ids)
        text = self._decode(self._window)
        ready = _complete(text)
        new = ready[self._num_shown :]
        if len(ready) == len(text):
            self._settle(bool(new), len(token_ids))
        else:
            self._num_shown = max(self._num_shown, len(ready))
            if len(self._window) - self._num_settled > MAX_HELD_TOKENS:
                new += self._cut(text)
        return new

    def flush(self) -> str:
        """What is left when no more tokens come, incomplete or not."""
        return self._decode(self._window)[self._num_shown :]

    def _settle(self, gave_text: bool, num_new_tokens: int) -> None:
        """All of the window is out: its latest part stays as context."""
        if gave_text:
            del self._window[: self._num_settled]
        elif num_new_tokens:
            del self._window[-num_new_tokens:]  # control tokens: without text, no context either
        self._num_settled = len(self._window)
        self._num_shown = len(self._decode(self._window))

    def _cut(self, text: str) -> str:
        """Shorten a window in which no character ended with a token's end for long.

        Either characters straddle the tokens, then all but the last one are out, or the bytes
        are no characters, then they are given up, but for the few that may still become one.
        """
        self._window = self._window[-KEPT_TOKENS:]
        self._num_settled = 0
        tail = self._decode(self._window)
        given_up = text[self._num_shown : len(text) - len(tail)]
        self._num_shown = len(_complete(tail))
        return given_up


def _complete(text: str) -> str:
    return text.rstrip(INCOMPLETE) if text.endswith(INCOMPLETE) else text
