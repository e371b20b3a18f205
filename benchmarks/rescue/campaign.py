"""Runs every case in every mode on the cards of this host, each card a queue of its own.

    python -m benchmarks.rescue.campaign --output rescue.json --limit-s 250

A trial is a process group of its own, ended after it; the next one imports meanwhile and starts
when the card's memory is back. The table is printed at the end, also when time runs out.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated

import pynvml
import typer

from benchmarks.memory.campaign import describe_host, write_models
from benchmarks.rescue.cases import BY_NAME, CASES, Case, Outcome
from benchmarks.rescue.report import table

MODES = ("plain", "diagnose", "fixed")
TRIAL_LIMIT_S = 170.0
MEMORY_BACK_S = 20.0
MEMORY_BACK_BYTES = 2**29


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    case: Case
    mode: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A trial whose process imports and waits for its turn."""

    trial: Trial
    process: subprocess.Popen[str]
    log: IO[str]
    result: Path


class Card:
    """One card's queue."""

    def __init__(self, index: int, work: Path, deadline_s: float) -> None:
        self._index = index
        self._work = work
        self._deadline_s = deadline_s
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        self._free_bytes = self._free()

    def run(self, trials: "Trials") -> None:
        ahead: Waiting | None = None
        while self._left_s() > 0:
            now = ahead or self._prepare(trials)
            if now is None:
                return
            ahead = self._prepare(trials)
            outcome = self._try(now)
            _end(now)
            trials.ended(outcome)
            self._wait_for_memory()
        if ahead is not None:
            _end(ahead)

    def _left_s(self) -> float:
        return self._deadline_s - time.monotonic()

    def _free(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).free)

    def _prepare(self, trials: "Trials") -> Waiting | None:
        trial = trials.next()
        if trial is None:
            return None
        name = f"{trial.case.name}-{trial.mode}".replace(" ", "_").replace("%", "")
        result, log = self._work / f"{name}.json", (self._work / f"{name}.log").open("w")
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.rescue.trial"),
                *(trial.case.name, trial.mode, str(self._work / "models"), str(result)),
            ],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(self._index)},
        )
        return Waiting(trial=trial, process=process, log=log, result=result)

    def _try(self, now: Waiting) -> Outcome:
        began_s = time.monotonic()
        assert now.process.stdin is not None
        with suppress(BrokenPipeError):
            now.process.stdin.write("go\n")
            now.process.stdin.flush()
        limit_s = min(TRIAL_LIMIT_S, max(self._left_s(), 0.0))
        with suppress(subprocess.TimeoutExpired):
            now.process.wait(limit_s)
        if now.result.exists():
            return Outcome(**json.loads(now.result.read_text()))
        seconds = time.monotonic() - began_s
        return Outcome(
            case=now.trial.case.name,
            mode=now.trial.mode,
            served=False,
            reason=f"the trial gave no result in {seconds:.0f} s",
            seconds=round(seconds, 1),
        )

    def _wait_for_memory(self) -> None:
        patience_s = time.monotonic() + MEMORY_BACK_S
        while time.monotonic() < patience_s:
            if self._free() > self._free_bytes - MEMORY_BACK_BYTES:
                return
            time.sleep(0.1)


class Trials:
    """What is to do, and what came of it, for all cards."""

    def __init__(self, todo: Sequence[Trial], output: Path, facts: dict[str, object]) -> None:
        self._todo = list(todo)
        self._output = output
        self._facts = facts
        self._lock = threading.Lock()
        self.outcomes: list[Outcome] = []

    def next(self) -> Trial | None:
        with self._lock:
            return self._todo.pop(0) if self._todo else None

    def ended(self, outcome: Outcome) -> None:
        with self._lock:
            self.outcomes.append(outcome)
            document = {**self._facts, "outcomes": [asdict(each) for each in self.outcomes]}
            self._output.write_text(json.dumps(document, indent=1) + "\n")
            print(
                f"{outcome.case} | {outcome.mode} | {outcome.served} | {outcome.seconds} s | "
                f"{outcome.reason[:160]}",
                flush=True,
            )


def _end(waiting: Waiting) -> None:
    """The whole group: an engine outlives the parent that started it."""
    with suppress(ProcessLookupError):
        os.killpg(waiting.process.pid, signal.SIGKILL)
    waiting.process.wait()
    waiting.log.close()


def main(
    output: Annotated[Path, typer.Option()],
    limit_s: Annotated[float, typer.Option(help="No trial goes on for longer.")] = 500.0,
    cases: Annotated[str, typer.Option(help="Names, semicolons between; all.")] = "",
    modes: Annotated[str, typer.Option()] = ",".join(MODES),
    work: Annotated[Path, typer.Option()] = Path("/tmp/ballast-rescue"),
) -> None:
    deadline_s = time.monotonic() + limit_s
    work.mkdir(parents=True, exist_ok=True)
    chosen = [BY_NAME[name] for name in cases.split(";")] if cases else list(CASES)
    write_models(work / "models", {case.model for case in chosen})
    facts = {"command": " ".join(sys.argv), **describe_host()}
    # Every case first in the modes that matter most; the long ones at the front of each.
    longest_first = sorted(chosen, key=lambda case: -case.num_requests)
    todo = [Trial(case=case, mode=mode) for mode in modes.split(",") for case in longest_first]
    trials = Trials(todo, output, facts)
    threads = [
        threading.Thread(target=Card(index, work, deadline_s).run, args=(trials,))
        for index in range(pynvml.nvmlDeviceGetCount())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(table(trials.outcomes))


if __name__ == "__main__":
    typer.run(main)
