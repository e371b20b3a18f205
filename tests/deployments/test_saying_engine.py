"""An engine that says a given text, for tests of what happens to it on the way. Has no tests."""

from dataclasses import dataclass, field

from deployments.engines.fake import FakeEngine, Script, _Sequence
from deployments.engines.protocol import TokenDelta, TokenLogprob
from deployments.faults import Fault
from deployments.oom import Cause


@dataclass(frozen=True, slots=True)
class Saying:
    """UTF-8 bytes as tokens, cut into steps of several."""

    text: str
    step_tokens: int = 1
    deaths: tuple[int, ...] = field(default=())  # tokens of all requests in each life

    @property
    def script(self) -> Script:
        faults = [
            Fault(life=life, after_tokens=tokens, cause=Cause.KILLED)
            for life, tokens in enumerate(self.deaths, start=1)
        ]
        return Script(step_s=0, faults=tuple(faults))


class SayingEngine(FakeEngine):
    """Says the text, and another one for each further choice; ends as a model does, by itself."""

    def __init__(self, saying: Saying) -> None:
        super().__init__(saying.script)
        self._saying = saying

    def _advance(self, sequence: _Sequence) -> TokenDelta:
        choice = int(sequence.request.request_id.rpartition("-")[2])
        said = (self._saying.text + str(choice)).encode()
        limit = sequence.request.sampling.max_tokens
        begin = len(sequence.output)
        new = tuple(said[begin : min(begin + self._saying.step_tokens, limit)])
        sequence.output.extend(new)
        reason = "length" if len(sequence.output) >= limit else None
        if len(sequence.output) == len(said):
            reason = "stop"
        logprobs = sequence.request.sampling.logprobs
        return TokenDelta(
            request_id=sequence.request.request_id,
            new_token_ids=new,
            logprobs=() if logprobs is None else tuple(map(_logprob, new)),
            finish_reason=reason,
        )


def _logprob(token: int) -> TokenLogprob:
    return TokenLogprob(token_id=token, logprob=-token / 256, top=((token, -token / 256),))
