"""What an engine died of: exceptions, last words, exit codes and log lines made into one death."""

import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from deployments.last_words import LastWord, described
from deployments.oom_messages import Cause, Reading, is_consequence, read
from deployments.phases import Phase
from vram.shortage import Shortage, ShortageKind

__all__ = ["Cause", "Death", "classify", "death_from_exception", "death_from_exit", "death_of"]

# vLLM 0.26 to 0.29 say so of a process that a signal ended: a worker's end in EngineCore's log,
# EngineCore's in the error of its start.
_ENDED_BY_SIGNAL = re.compile(r"(?:\(exit code: |Failed core proc\(s\): \{[^}]*?: )(-\d+)")
# vLLM looks for the exit code before the kernel has it, and Ray's executor does not look.
_VANISHED = re.compile(
    r"Worker proc \S+ died unexpectedly \(exit code: None\)|RayWorkerProc .*died unexpectedly"
)
# Computed and not asked for: what is free on the device is not what was short.
_PLANNED = {
    ShortageKind.NO_CACHE_BLOCKS,
    ShortageKind.CONTEXT_TOO_LONG,
    ShortageKind.TOO_MANY_SEQUENCES,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """How one life of an engine ended."""

    cause: Cause
    phase: str  # "loading" or "running"
    message: str
    shortage: Shortage | None = None  # of device memory
    requests: tuple[str, ...] = ()  # ids in the batch of the step that died

    @property
    def is_memory(self) -> bool:
        return self.cause is Cause.DEVICE_MEMORY

    def __str__(self) -> str:
        kind = "" if self.shortage is None else f" ({self.shortage.kind.value})"
        return f"{self.cause.value}{kind} while {self.phase}: {self.message}"


def classify(text: str) -> Cause:
    """The cause that an error text, or a log of one, speaks of."""
    return read(text).cause


def death_of(
    phase: str,
    *,
    words: Iterable[LastWord] = (),
    error: BaseException | None = None,
    exit_codes: Sequence[int] = (),
) -> Death:
    """The first real cause, not the last noise: what a dying engine says is mostly of its own end.

    What came out of a worker first counts alone. Without that: the first to name a cause among the
    logged exceptions, the logged lines and the parent's own error. Next a signal, as vLLM has other
    errors to tell after one: "Executor failed."
    """
    words = tuple(words)
    told = [word for word in words if not is_consequence(word.text)]
    parent = () if error is None else (LastWord(process_id=0, errors=described(error)),)
    exceptions = [word for word in told if word.errors]
    lines = [word for word in told if not word.errors]
    witnesses = [word for word in told if word.is_fatal][:1] or [*exceptions, *lines, *parent]
    for word in witnesses:
        if _read(word).cause is not Cause.OTHER:
            return _death_of_word(word, phase)
    texts = [word.text for word in (*words, *parent)]
    signals = [code for code in (*exit_codes, *_told_signals(texts)) if code < 0]
    if signals:
        return death_from_exit(signals[0], phase)
    if not exceptions and any(_VANISHED.search(text) for text in texts):
        message = "a worker's process is gone without a word"
        return Death(cause=Cause.KILLED, phase=phase, message=message)
    for word in ([word for word in told if word.is_fatal] or [*exceptions, *parent, *lines])[:1]:
        return _death_of_word(word, phase)
    return death_from_exit(exit_codes[0] if exit_codes else None, phase)


def death_from_exception(
    error: BaseException,
    phase: str,
    *,
    during: Phase | None = None,
    device_type: str = "",
    requests: Sequence[str] = (),
) -> Death:
    """Classify an exception by itself and by what it wraps; `during` is the engine's phase."""
    word = LastWord(
        process_id=0,
        errors=described(error),
        phase=during,
        device_type=device_type,
        requests=tuple(requests),
    )
    return _death_of_word(word, phase)


def death_from_exit(exit_code: int | None, phase: str) -> Death:
    """Classify the end of a process that said nothing."""
    if exit_code == -signal.SIGBUS:
        message = f"ended by signal {signal.SIGBUS.value}: /dev/shm is probably full"
        return Death(cause=Cause.SHARED_MEMORY, phase=phase, message=message)
    if exit_code is not None and exit_code < 0:
        return Death(cause=Cause.KILLED, phase=phase, message=f"ended by signal {-exit_code}")
    return Death(cause=Cause.OTHER, phase=phase, message=f"ended with exit code {exit_code}")


def _death_of_word(word: LastWord, phase: str) -> Death:
    reading = _read(word)
    return Death(
        cause=reading.cause,
        phase=phase,
        message=_message(word, reading),
        shortage=_completed(reading.shortage, word, phase),
        requests=word.requests,
    )


def _message(word: LastWord, reading: Reading) -> str:
    """The first line of the exception that says it, or of the outermost."""
    texts = word.errors or (word.logged,)
    said = (text for text in texts if _read(replace(word, errors=(text,))).cause is reading.cause)
    text = next(said, texts[0]).strip()
    return text.splitlines()[0][:500] if text else "no message"


def _read(word: LastWord) -> Reading:
    return read(word.text, word.phase, word.device_type)


def _completed(shortage: Shortage | None, word: LastWord, phase: str) -> Shortage | None:
    """With what the process itself measured, where the message does not say it."""
    if shortage is None:
        return None
    if shortage.kind is ShortageKind.UNKNOWN and phase == "running":
        shortage = replace(shortage, kind=ShortageKind.RUN_TIME)
    if shortage.kind in _PLANNED:
        return shortage
    measured = {
        "free_bytes": word.free_bytes,
        "total_bytes": word.total_bytes,
        "reserved_bytes": word.reserved_bytes,
    }
    missing = {key: value for key, value in measured.items() if getattr(shortage, key) is None}
    return replace(shortage, **missing)  # type: ignore[arg-type]


def _told_signals(texts: Iterable[str]) -> list[int]:
    return [int(code) for text in texts for code in _ENDED_BY_SIGNAL.findall(text)]
