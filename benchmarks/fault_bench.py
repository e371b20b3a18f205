"""Runs the rows of `benchmarks.faults` on real servers, each server for as many as it can."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from benchmarks import fault_load, fault_report
from benchmarks.fault_blow import RECOVERY_TIMEOUT_S, strike
from benchmarks.fault_load import Traffic
from benchmarks.fault_report import Outcome
from benchmarks.fault_rows import RAY_SERVERS, REPLICA, ROWS, Row, faults_of, first_lives
from benchmarks.one_model import one_model, status
from benchmarks.servers import (
    SERVERS,
    RunningServer,
    ServerFailedError,
    ServerKind,
    Settings,
    running,
)

CLIENTS = 8
MANY_CLIENTS = 16  # of the row in which as many again come late
NEIGHBOUR_TIMEOUT_S = 60.0  # of one request


class OtherLifeError(Exception):
    """The server is not in the life that a row's faults were written for."""


class Bench:
    """Runs rows; keeps the undisturbed answers, which all rows are compared with."""

    def __init__(
        self,
        settings: Settings,
        *,
        requests: int,
        output_tokens: int,
        say: Callable[[Outcome], None],
    ) -> None:
        self._settings = settings
        self._requests = requests
        self._output_tokens = output_tokens
        self._say = say
        self._expected: dict[int, list[int]] = {}

    def run_group(self, rows: Sequence[Row]) -> list[Outcome]:
        """One server, or one more where a row left it in another life than planned."""
        outcomes = [self._said(_skipped(row)) for row in rows if row.missing_settings]
        waiting = [row for row in rows if not row.missing_settings]
        while waiting:
            begun_with = len(waiting)
            try:
                with running(self._kind(waiting), self._settings) as server:
                    for row, life in zip(tuple(waiting), first_lives(waiting), strict=True):
                        outcomes.append(self._said(self._run_row(row, server, life)))
                        waiting.remove(row)
            except OtherLifeError as error:
                if len(waiting) == begun_with:
                    outcomes.append(self._said(_broken(waiting.pop(0), str(error))))
            except ServerFailedError as error:
                outcomes.append(self._said(_broken(waiting.pop(0), str(error))))
        return outcomes

    def run_neighbour(self, name: str) -> Outcome:
        """Ray Serve LLM, its EngineCore killed."""
        kind = SERVERS[RAY_SERVERS[name]]
        row = Row(name=name, title=f"{kind.title}: EngineCore killed", blow=ROWS["core"].blow)
        missing = [package for package in ("pyarrow", "jsonref") if find_spec(package) is None]
        if missing:
            return self._said(_broken(row, f"skipped: needs {', '.join(missing)}"))
        try:
            with running(kind, self._settings) as server:
                return self._said(self._measure(row, server, timeout_s=NEIGHBOUR_TIMEOUT_S))
        except ServerFailedError as error:
            return self._said(_broken(row, str(error)))

    def _kind(self, rows: Sequence[Row]) -> ServerKind:
        """`ballast serve` with one model, and the faults of these rows."""
        marked = fault_load.mark(self._marked_number())
        recovery: dict[str, object] = {"max_restarts": 100}
        for row in rows:
            recovery |= row.recovery
        return one_model(
            {
                "max_model_len": self._settings.max_model_len,
                "max_num_seqs": self._settings.max_num_seqs,
                "recovery": recovery,
                "fault_injection": True,
                "faults": faults_of(rows, marked),
            }
        )

    def _run_row(self, row: Row, server: RunningServer, life: int) -> Outcome:
        found = status(server)["attempt"]
        serving = life + (row.dies_before_load and row.lives)
        if found != serving:
            raise OtherLifeError(f"life {found} serves, and the row was written for {serving}")
        outcome = self._measure(row, server)
        if row.blow is not None and row.blow.process == REPLICA:
            return outcome  # the status is another replica's
        return replace(outcome, **_story(row, _settled(server), life, outcome.recovery_s))

    def _measure(self, row: Row, server: RunningServer, *, timeout_s: float = 300.0) -> Outcome:
        """The load, and the blow in its midst; `recovery_s` as the clients see it."""
        clients = MANY_CLIENTS if row.half_come_late else CLIENTS
        late = MANY_CLIENTS if row.half_come_late else 0
        traffic = Traffic(
            base_url=f"{server.url}/v1",
            clients=clients,
            late_clients=late,
            requests_per_client=self._requests // (clients + late),
            output_tokens=self._output_tokens,
            timeout_s=timeout_s,
        )
        struck = strike(traffic, row.blow)
        if row.name == "undisturbed":
            self._expected = {t.number: t.token_ids for t in struck.answers if not t.failure}
        outcome = fault_report.counted(row, struck.answers, self._expected)
        return replace(outcome, recovery_s=struck.recovery_s)

    def _marked_number(self) -> int:
        """Of the request that a fault waits for: a quarter into the load."""
        each = self._requests // CLIENTS
        return CLIENTS // 2 * each + each // 4

    def _said(self, outcome: Outcome) -> Outcome:
        self._say(outcome)
        return outcome


def _story(
    row: Row, told: dict[str, Any], first: int, seen_recovery_s: float | None
) -> dict[str, Any]:
    """What the server says of the row's lives: how they ended, and how long their loads took."""
    lives = [event for event in told["events"] if event["attempt"] >= first]
    last = lives[-1]
    planned = first + row.lives
    note = "" if last["attempt"] == planned else f"life {last['attempt']} instead of {planned}"
    story: dict[str, Any] = {
        "deaths": [f"{each['cause']} while {each['phase']}" for each in lives if each["cause"]],
        "note": note,
    }
    if len(lives) < 2 or last["started_at"] is None:
        return story
    ends = [each["started_at"] or each["died_at"] for each in lives[1:]]
    story["own_start_s"] = sum(
        end - each["spawned_at"] for each, end in zip(lives[1:], ends, strict=True)
    )
    if seen_recovery_s is None:
        story["recovery_s"] = last["started_at"] - lives[0]["died_at"]
    return story


def _settled(server: RunningServer) -> dict[str, Any]:
    """The status, when nothing recovers any more."""
    deadline_s = time.monotonic() + RECOVERY_TIMEOUT_S
    while (told := status(server))["state"] not in ("ready", "failed"):
        if time.monotonic() > deadline_s:
            raise ServerFailedError(f"still {told['state']} after {RECOVERY_TIMEOUT_S:.0f} s")
        time.sleep(0.2)
    return told


def _skipped(row: Row) -> Outcome:
    words = ", ".join(f"recovery.{name}" for name in row.missing_settings)
    return _broken(row, f"skipped: this version has no {words}")


def _broken(row: Row, note: str) -> Outcome:
    return Outcome(name=row.name, title=row.title, note=note)
