"""Log probabilities in OpenAI's two shapes."""

from collections.abc import Sequence

from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob
from openai.types.completion_choice import Logprobs

from deployments.engines.protocol import TokenLogprob
from deployments.openai.tokenizers import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's and vLLM's number for "never"


def chat_logprobs(
    logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer
) -> list[ChatCompletionTokenLogprob]:
    return [
        ChatCompletionTokenLogprob(
            token=_text(token := tokenizer.token_bytes(entry.token_id)),
            bytes=list(token),
            logprob=max(entry.logprob, LOWEST_LOGPROB),
            top_logprobs=[
                TopLogprob(
                    token=_text(other := tokenizer.token_bytes(token_id)),
                    bytes=list(other),
                    logprob=max(logprob, LOWEST_LOGPROB),
                )
                for token_id, logprob in entry.top
            ],
        )
        for entry in logprobs
    ]


def completion_logprobs(
    logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer, first_offset: int
) -> Logprobs:
    """`first_offset`: characters of the answer's tokens before these."""
    tokens = [_text(tokenizer.token_bytes(entry.token_id)) for entry in logprobs]
    offsets = [first_offset]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return Logprobs(
        tokens=tokens,
        text_offset=offsets[:-1],
        token_logprobs=[max(entry.logprob, LOWEST_LOGPROB) for entry in logprobs],
        top_logprobs=[
            {
                _text(tokenizer.token_bytes(token_id)): max(logprob, LOWEST_LOGPROB)
                for token_id, logprob in ((entry.token_id, entry.logprob), *entry.top)
            }
            for entry in logprobs
        ],
    )


def _text(token: bytes) -> str:
    return token.decode(errors="replace")
