"""Which request ends the engine: suspects after deaths, a trial of each alone, a verdict. Pure.

A request in the batch of two deaths of one cause is a suspect. It is replayed last and alone; if
the engine dies then, that is a strike, and two strikes convict. A suspect that goes on for a while
past the token at which it died is cleared. Knows requests by their ids, and no engine.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from deployments.oom import Cause, Death

SUSPECT_DEATHS = 2  # of the same cause, with the request in the batch
STRIKES = 2  # deaths with no other request to blame
# One prefill and a few steps: what ends an engine does so at the same token again.
PROBATION_TOKENS = 16

_SIGNAL = re.compile(r"\bsignal (\d+)")
# SIGINT, SIGKILL, SIGTERM, SIGSTOP: sent from outside, whatever the request did.
_FROM_OUTSIDE = frozenset({2, 9, 15, 19})
_BY_SIGNAL = frozenset({Cause.KILLED, Cause.STALLED})
_OF_MEMORY = frozenset({Cause.DEVICE_MEMORY, Cause.HOST_MEMORY})


@dataclass(slots=True, kw_only=True)
class Record:
    """What is held against one request."""

    deaths: dict[Cause, int] = field(default_factory=dict)
    strikes: int = 0
    first_generation: int = 0  # the first life that died with it
    pass_at_tokens: int = 0  # emitted tokens with which it is cleared

    @property
    def is_suspect(self) -> bool:
        return max(self.deaths.values(), default=0) >= SUSPECT_DEATHS


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """What a death means: whose fault it was, as far as that is known.

    `is_strike`: of one request alone, so smaller settings are no answer. With a conviction,
    `first_generation` is the life whose settings were in force before the suspicion.
    """

    is_strike: bool = False
    convicted: str | None = None
    deaths: int = 0  # that the convicted one was in
    first_generation: int = 0


class Quarantine:
    """The records of the requests in flight."""

    def __init__(self) -> None:
        self.on_trial: str | None = None
        self._records: dict[str, Record] = {}

    def blame(
        self,
        generation: int,
        death: Death,
        emitted: Mapping[str, int],
        *,
        in_flight: Collection[str],
    ) -> Blame:
        """Note the death of a life that served; `emitted`: tokens of each request it had."""
        self._forget_all_but(in_flight)
        on_trial, self.on_trial = self.on_trial, None
        if not is_evidence(death):
            return Blame()
        batch = tuple(i for i in death.requests if i in emitted) or tuple(emitted)
        is_alone = len(death.requests or emitted) == 1
        tried = on_trial in batch
        if tried and on_trial is not None:
            batch = (on_trial,)
        for request_id in batch:
            self._note(request_id, generation, death.cause, emitted[request_id])
        # Who is alone by chance is to blame only if the engine could say what it died of.
        if not (tried or (is_alone and batch and death.cause in _OF_MEMORY)):
            return Blame()
        record = self._records[batch[0]]
        record.strikes += 1
        if record.strikes < STRIKES:
            return Blame(is_strike=tried)
        del self._records[batch[0]]
        return Blame(
            is_strike=True,
            convicted=batch[0],
            deaths=sum(record.deaths.values()),
            first_generation=record.first_generation,
        )

    def suspects(self, in_flight: Iterable[str]) -> tuple[str, ...]:
        """Those to be tried, in the order of it: the likeliest to end the engine come last."""
        found = [i for i in in_flight if i in self._records and self._records[i].is_suspect]
        return tuple(sorted(found, key=lambda request_id: self._records[request_id].strikes))

    def pass_at_tokens(self, request_id: str) -> int:
        """Emitted tokens with which a trial is over."""
        return self._records[request_id].pass_at_tokens

    def clear(self, request_id: str) -> None:
        """It was tried and the engine lives."""
        self.on_trial = None
        self._records.pop(request_id, None)

    def _note(self, request_id: str, generation: int, cause: Cause, num_emitted: int) -> None:
        record = self._records.setdefault(request_id, Record(first_generation=generation))
        record.deaths[cause] = record.deaths.get(cause, 0) + 1
        record.pass_at_tokens = num_emitted + PROBATION_TOKENS

    def _forget_all_but(self, in_flight: Collection[str]) -> None:
        for request_id in [i for i in self._records if i not in in_flight]:
            del self._records[request_id]


def is_evidence(death: Death) -> bool:
    """Whether a request can have caused it: not a signal that only comes from outside."""
    signal = _SIGNAL.search(death.message)
    return not (
        death.cause in _BY_SIGNAL and signal is not None and int(signal[1]) in _FROM_OUTSIDE
    )
