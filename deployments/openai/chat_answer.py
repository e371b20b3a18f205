"""OpenAI's chat.completion and chat.completion.chunk."""

from collections.abc import Sequence

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, chat_completion
from openai.types.chat import chat_completion_chunk as chunk_types
from openai.types.chat.chat_completion_message import ChatCompletionMessage

from deployments.openai.choice import Piece
from deployments.openai.logprobs import chat_logprobs
from deployments.openai.tokenizers import Tokenizer
from deployments.openai.wire import TextFrame, event


class ChatWriter:
    """AnswerWriter of /v1/chat/completions."""

    def __init__(self, answer_id: str, model: str, created_s: int, tokenizer: Tokenizer) -> None:
        self._id = answer_id
        self._model = model
        self._created_s = created_s
        self._tokenizer = tokenizer
        self._frames: dict[int, TextFrame] = {}

    def opening(self, num_choices: int) -> bytes:
        delta = chunk_types.ChoiceDelta(role="assistant", content="")
        return b"".join(self._chunk(index, delta) for index in range(num_choices))

    def piece(self, piece: Piece) -> bytes:
        if piece.logprobs or piece.finish_reason:
            delta = chunk_types.ChoiceDelta(content=piece.text)
            return self._chunk(piece.index, delta, piece)
        if piece.index not in self._frames:
            empty = self._chunk(piece.index, chunk_types.ChoiceDelta(content=""))
            self._frames[piece.index] = TextFrame(empty, "content")
        return self._frames[piece.index].with_text(piece.text)

    def usage(self, usage: CompletionUsage) -> bytes:
        return event(_json(self._envelope([], usage)))

    def whole(self, pieces: Sequence[Piece], usage: CompletionUsage) -> bytes:
        choices = []
        for piece in pieces:
            logprobs = None
            if piece.logprobs:
                content = chat_logprobs(piece.logprobs, self._tokenizer)
                logprobs = chat_completion.ChoiceLogprobs(content=content)
            message = ChatCompletionMessage(role="assistant", content=piece.text, refusal=None)
            choices.append(
                chat_completion.Choice(
                    index=piece.index,
                    message=message,
                    logprobs=logprobs,
                    finish_reason=piece.finish_reason,  # type: ignore[arg-type]
                )
            )
        answer = ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created_s,
            model=self._model,
            choices=choices,
            usage=usage,
        )
        return _json(answer)

    def _chunk(
        self, index: int, delta: chunk_types.ChoiceDelta, piece: Piece | None = None
    ) -> bytes:
        logprobs = None
        if piece is not None and piece.logprobs:
            content = chat_logprobs(piece.logprobs, self._tokenizer)
            logprobs = chunk_types.ChoiceLogprobs(content=content)
        choice = chunk_types.Choice(
            index=index,
            delta=delta,
            logprobs=logprobs,
            finish_reason=piece.finish_reason if piece else None,  # type: ignore[arg-type]
        )
        return event(_json(self._envelope([choice])))

    def _envelope(
        self, choices: list[chunk_types.Choice], usage: CompletionUsage | None = None
    ) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created_s,
            model=self._model,
            choices=choices,
        )
        if usage is not None:
            chunk.usage = usage
        return chunk


def _json(answer: ChatCompletion | ChatCompletionChunk) -> bytes:
    return answer.model_dump_json(exclude_unset=True).encode()
