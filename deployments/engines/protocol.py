"""What every engine is to Ballast: five methods, and a listener for its tokens and its death.

An engine object outlives its processes: `start` begins a life, `stop` ends it and leaves nothing
behind, and `start` may be called again with other settings. Knows nothing of HTTP or of Ray Serve.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from deployments.oom import Death
from vram.settings import EngineSettings


class Delta(Protocol):
    """New tokens of one request. vLLM's `EngineCoreOutput` has this shape as it stands."""

    @property
    def request_id(self) -> str: ...
    @property
    def new_token_ids(self) -> Sequence[int]: ...
    @property
    def finished(self) -> bool: ...


class Step(Protocol):
    """What one step of the engine gave out. vLLM's `EngineCoreOutputs` has this shape."""

    @property
    def outputs(self) -> Sequence[Delta]: ...


class Listener(Protocol):
    """Hears what a life of the engine has to say, on the event loop that called `start`."""

    def stepped(self, step: Step) -> None: ...
    def died(self, death: Death) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What the engine really holds, in bytes, summed over its processes."""

    resident_bytes: int
    device_bytes: int
    process_ids: tuple[int, ...]
    # What the engine itself said when it had loaded: bytes per GPU by the names of an estimate's
    # items, and `kv_cache_tokens`. Empty for an engine that says nothing.
    reported: Mapping[str, int] = field(default_factory=dict)


R = TypeVar("R", contravariant=True)


class Engine(Protocol[R]):
    """`R` is the engine's own request type: `TokenRequest`, or vLLM's `EngineCoreRequest`."""

    async def start(self, settings: EngineSettings, listener: Listener) -> None:
        """Load with exactly these settings. Raises `LoadFailed` with the death it died of."""

    async def generate(self, request: R, emitted: Sequence[int]) -> None:
        """Queue the request; its tokens come to the listener.

        `emitted` are the tokens that the client already has: generation goes on after them, with
        limits, penalties and grammars counted as if the engine had never stopped. Raises
        `EngineDied` when there is no engine to take it.
        """

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Forget these requests and free what they hold. Unknown ids are ignored."""

    async def measure(self) -> Measurement:
        """What the engine's processes hold now."""

    async def stop(self) -> None:
        """End every process of this life and wait until they are gone. Never raises for a death."""


class LoadFailed(Exception):
    """`start` did not end in a running engine."""

    def __init__(self, death: Death) -> None:
        super().__init__(death)
        self.death = death

    def __str__(self) -> str:
        return str(self.death)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen, for the engines that Ballast's own OpenAI layer drives."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int | None = None  # how many alternatives a token; None: no logprobs at all
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """A request in tokens: what `fake` and `transformers` take."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """The log probability of a chosen token, and of the likeliest alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDelta:
    """New tokens of one request. `finish_reason`: None while it runs, "stop" (eos) or "length"."""

    request_id: str
    new_token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStep:
    """One step of an engine that speaks in `TokenDelta`s."""

    outputs: tuple[TokenDelta, ...]
