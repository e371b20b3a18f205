"""OpenAI's text_completion, whose chunks have the same shape as the whole."""

from collections.abc import Sequence
from dataclasses import replace

from openai.types import Completion, CompletionUsage
from openai.types.completion_choice import CompletionChoice

from deployments.openai.choice import Piece
from deployments.openai.logprobs import completion_logprobs
from deployments.openai.tokenizers import Tokenizer
from deployments.openai.wire import TextFrame, event


class CompletionWriter:
    """AnswerWriter of /v1/completions."""

    def __init__(self, answer_id: str, model: str, created_s: int, tokenizer: Tokenizer) -> None:
        self._id = answer_id
        self._model = model
        self._created_s = created_s
        self._tokenizer = tokenizer
        self._frames: dict[int, TextFrame] = {}
        self._offsets: dict[int, int] = {}

    def opening(self, num_choices: int) -> bytes:
        return b""

    def piece(self, piece: Piece) -> bytes:
        if piece.logprobs or piece.finish_reason:
            return event(_json(self._envelope([self._choice(piece)])))
        if piece.index not in self._frames:
            empty = event(_json(self._envelope([self._choice(replace(piece, text=""))])))
            self._frames[piece.index] = TextFrame(empty, "text")
        return self._frames[piece.index].with_text(piece.text)

    def usage(self, usage: CompletionUsage) -> bytes:
        return event(_json(self._envelope([], usage)))

    def whole(self, pieces: Sequence[Piece], usage: CompletionUsage) -> bytes:
        return _json(self._envelope([self._choice(piece) for piece in pieces], usage))

    def _choice(self, piece: Piece) -> CompletionChoice:
        logprobs = None
        if piece.logprobs:
            first_offset = self._offsets.get(piece.index, 0)
            logprobs = completion_logprobs(piece.logprobs, self._tokenizer, first_offset)
            written = sum(map(len, logprobs.tokens or ()))
            self._offsets[piece.index] = first_offset + written
        # Unchecked: in a chunk the reason to finish is null, which the type does not know.
        return CompletionChoice.model_construct(
            index=piece.index,
            text=piece.text,
            logprobs=logprobs,
            finish_reason=piece.finish_reason,  # type: ignore[arg-type]
        )

    def _envelope(
        self, choices: list[CompletionChoice], usage: CompletionUsage | None = None
    ) -> Completion:
        completion = Completion.model_construct(
            id=self._id,
            object="text_completion",
            created=self._created_s,
            model=self._model,
            choices=choices,
        )
        if usage is not None:
            completion.usage = usage
        return completion


def _json(answer: Completion) -> bytes:
    # Without warnings: a chunk's reason to finish is null, which OpenAI's type does not know.
    return answer.model_dump_json(exclude_unset=True, warnings=False).encode()
