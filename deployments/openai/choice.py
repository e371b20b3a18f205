"""One choice of an answer: tokens in, text out. Knows no wire format."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from deployments.engines.protocol import TokenDelta, TokenLogprob, TokenRequest
from deployments.openai.detokenizer import Detokenizer
from deployments.openai.stops import StopScanner
from deployments.openai.tokenizers import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What is new of one choice."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.logprobs or self.finish_reason)


class Choice:
    """Turns the deltas of one `TokenRequest` into text, up to its stop string."""

    def __init__(
        self,
        index: int,
        request: TokenRequest,
        tokenizer: Tokenizer,
        stops: tuple[str, ...] = (),
        echo: str = "",
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._min_tokens = request.sampling.min_tokens
        self._detokenizer = Detokenizer(tokenizer.decode, request.prompt_token_ids)
        self._scanner = StopScanner(stops) if stops else None
        self._texts = [echo]
        self._logprobs: list[TokenLogprob] = []

    @property
    def has_news(self) -> bool:
        return bool(self._texts)

    def feed(self, delta: TokenDelta) -> None:
        """Tokens behind the stop string are neither shown nor counted."""
        # Token by token where a stop string may end the text in the middle of a delta, so that
        # the count does not depend on how the tokens were bundled.
        for part in (delta,) if self._scanner is None else _single_tokens(delta):
            if self.finish_reason is None:
                self._advance(part)

    def take(self) -> Piece:
        """What came since the last call."""
        piece = Piece(
            index=self.index,
            text="".join(self._texts),
            logprobs=tuple(self._logprobs),
            finish_reason=self.finish_reason,
        )
        self._texts.clear()
        self._logprobs.clear()
        return piece

    def _advance(self, delta: TokenDelta) -> None:
        self.num_tokens += len(delta.new_token_ids)
        self._logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason
        text = self._detokenizer.feed(delta.new_token_ids)
        if delta.finished:
            text += self._detokenizer.flush()
        if self._scanner is not None and self.num_tokens > self._min_tokens:
            text = self._scanner.feed(text)
            if self._scanner.found is not None:
                self.finish_reason = "stop"
            elif delta.finished:
                text += self._scanner.flush()
        self._texts.append(text)


class Choices:
    """All choices of one answer."""

    def __init__(
        self,
        requests: Sequence[TokenRequest],
        tokenizer: Tokenizer,
        stops: tuple[str, ...],
        echoes: Sequence[str],
    ) -> None:
        self._by_request = {
            request.request_id: Choice(index, request, tokenizer, stops, echo)
            for index, (request, echo) in enumerate(zip(requests, echoes, strict=True))
        }

    @property
    def num_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self._by_request.values())

    def feed(self, deltas: Sequence[TokenDelta]) -> list[str]:
        """The requests that have all that they need while the engine would go on."""
        ended = []
        for delta in deltas:
            choice = self._by_request[delta.request_id]
            was_running = choice.finish_reason is None
            choice.feed(delta)
            if was_running and choice.finish_reason is not None and not delta.finished:
                ended.append(delta.request_id)
        return ended

    def take(self) -> list[Piece]:
        """What is new, of the choices that have something new."""
        pieces = (choice.take() for choice in self._by_request.values() if choice.has_news)
        return [piece for piece in pieces if not piece.is_empty]

    def take_all(self) -> list[Piece]:
        return [choice.take() for choice in self._by_request.values()]


def _single_tokens(delta: TokenDelta) -> Iterator[TokenDelta]:
    last = len(delta.new_token_ids) - 1
    if last < 1:
        yield delta
        return
    for number, token in enumerate(delta.new_token_ids):
        yield replace(
            delta,
            new_token_ids=(token,),
            logprobs=delta.logprobs[number : number + 1],
            finish_reason=delta.finish_reason if number == last else None,
        )
