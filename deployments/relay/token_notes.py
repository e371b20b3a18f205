"""Notes of the engines that speak in `TokenRequest` and `TokenDelta`."""

from collections.abc import Sequence
from typing import Any

from deployments.engines.protocol import TokenDelta, TokenLogprob, TokenRequest, TokenStep
from deployments.relay.copies import Copy


class TokenNotation:
    """Notation[TokenRequest, TokenDelta]: tokens, finish reason, log probabilities."""

    def key(self, copy: Copy, request: TokenRequest) -> str:
        return str(copy.next_number())  # choices are handed over in the order of their indices

    def can_continue(self, request: TokenRequest) -> bool:
        return True

    def write(self, delta: TokenDelta) -> Any:
        logprobs = [(each.token_id, each.logprob, each.top) for each in delta.logprobs]
        return [delta.new_token_ids, delta.finish_reason, logprobs]

    def read(self, request_id: str, note: Any) -> Sequence[TokenDelta]:
        token_ids, finish_reason, logprobs = note
        last = len(token_ids) - 1
        if last < 0:
            return (TokenDelta(request_id=request_id, new_token_ids=(),
                               finish_reason=finish_reason),)  # fmt: skip
        return tuple(
            TokenDelta(
                request_id=request_id,
                new_token_ids=(token,),
                logprobs=tuple(map(_logprob, logprobs[number : number + 1])),
                finish_reason=finish_reason if number == last else None,
            )
            for number, token in enumerate(token_ids)
        )

    def step(self, deltas: Sequence[TokenDelta]) -> TokenStep:
        return TokenStep(outputs=tuple(deltas))


def _logprob(written: Any) -> TokenLogprob:
    token_id, logprob, top = written
    return TokenLogprob(
        token_id=token_id, logprob=logprob, top=tuple((token, value) for token, value in top)
    )
