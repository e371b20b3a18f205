"""An engine without a model: its tokens follow a rule, and it dies when its script says so.

A real small implementation of the protocol, for tests and for trying Ballast out without a model:
what it answers depends on nothing but the prompt, so a replayed answer can be checked.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from deployments.engines.protocol import (
    Listener,
    LoadFailed,
    Measurement,
    TokenDelta,
    TokenRequest,
    TokenStep,
)
from deployments.errors import EngineDied
from deployments.faults import Fault, InBatch, Rehearsal, death_of
from deployments.oom import Death
from deployments.phases import LOADING
from vram.settings import EngineSettings

VOCAB_TOKENS = 256  # a token is a byte; the printable ones are given out
_FIRST, _LAST = 97, 122  # a-z


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """How fast it is and when it dies."""

    step_s: float = 0.001
    load_s: float = 0.0
    faults: tuple[Fault, ...] = ()


def next_token(tokens: Sequence[int]) -> int:
    """The rule: a letter that depends on all tokens so far, so that a lost one would show."""
    value = len(tokens)
    for token in tokens:
        value = (value * 31 + token + 7) % 65_521
    return _FIRST + value % (_LAST - _FIRST + 1)


@dataclass(slots=True, kw_only=True)
class _Sequence:
    request: TokenRequest
    output: list[int] = field(default_factory=list)
    is_replayed: bool = False


class FakeEngine:
    """Engine[TokenRequest]."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.lives: list[EngineSettings] = []
        self._running: dict[str, _Sequence] = {}
        self._listener: Listener | None = None
        self._loop_task: asyncio.Task[None] | None = None

    @property
    def num_running(self) -> int:
        return len(self._running)

    async def start(self, settings: EngineSettings, listener: Listener) -> None:
        self.lives.append(settings)
        await asyncio.sleep(self.script.load_s)
        rehearsal = Rehearsal(self.script.faults, len(self.lives))
        for phase in LOADING:
            fault = rehearsal.entered(phase)
            if fault is not None:
                death = death_of(fault)
                if death is None:
                    await asyncio.Event().wait()  # stopped: until somebody cancels it
                else:
                    raise LoadFailed(death)
        self._listener = listener
        self._loop_task = asyncio.create_task(self._run(listener, rehearsal))

    async def generate(self, request: TokenRequest, emitted: Sequence[int]) -> None:
        if self._listener is None:
            raise EngineDied("the fake engine is not running")
        self._running[request.request_id] = _Sequence(
            request=request, output=list(emitted), is_replayed=bool(emitted)
        )

    async def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._running.pop(request_id, None)

    async def measure(self) -> Measurement:
        return Measurement(resident_bytes=0, device_bytes=0, process_ids=())

    async def stop(self) -> None:
        self._running.clear()
        self._listener = None
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
            self._loop_task = None

    def die(self, death: Death) -> None:
        """End this life now, as a kill from outside would."""
        listener, self._listener = self._listener, None
        self._running.clear()
        if self._loop_task is not None:
            self._loop_task.cancel()
        if listener is not None:
            listener.died(death)

    async def _run(self, listener: Listener, rehearsal: Rehearsal) -> None:
        while True:
            await asyncio.sleep(self.script.step_s)
            if not self._running:
                continue
            fault = rehearsal.stepping([_in_batch(s) for s in self._running.values()])
            if fault is not None:
                death = death_of(fault, tuple(self._running))
                if death is not None:
                    self.die(death)
                return  # a stopped one says nothing any more
            deltas = tuple(self._advance(sequence) for sequence in self._running.values())
            rehearsal.generated(len(deltas))
            for delta in deltas:
                if delta.finished:
                    del self._running[delta.request_id]
            listener.stepped(TokenStep(outputs=deltas))

    def _advance(self, sequence: _Sequence) -> TokenDelta:
        token = next_token((*sequence.request.prompt_token_ids, *sequence.output))
        sequence.output.append(token)
        full = len(sequence.output) >= sequence.request.sampling.max_tokens
        return TokenDelta(
            request_id=sequence.request.request_id,
            new_token_ids=(token,),
            finish_reason="length" if full else None,
        )


def _in_batch(sequence: _Sequence) -> InBatch:
    prompt = bytes(sequence.request.prompt_token_ids).decode(errors="replace")
    return InBatch(prompt=prompt, is_replayed=sequence.is_replayed)
