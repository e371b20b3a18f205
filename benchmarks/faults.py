"""Kills, stops and starves the engine under load in every way, and counts what the clients saw.

    python -m benchmarks.faults

Each row is the load that NVIDIA publishes for Dynamo, 8 clients with 100 requests each, on the demo
model and a real server. Every token is compared with an undisturbed run. Ends with 1 if a row of
Ballast's has a failed request, or a lost or repeated token.
"""

import asyncio
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
import yaml
from rich.console import Console

from benchmarks import fault_load, fault_report, processes, report
from benchmarks.fault_load import Told, Traffic
from benchmarks.fault_report import Outcome
from benchmarks.fault_rows import (
    ENGINE_CORE,
    RAY_SERVERS,
    REPLICA,
    ROWS,
    Blow,
    Row,
    faults_of,
    first_lives,
    groups,
)
from benchmarks.servers import (
    REPOSITORY,
    SERVERS,
    Endpoint,
    RunningServer,
    ServerFailedError,
    ServerKind,
    Settings,
    program,
    running,
)
from cluster.demo_model import build_demo_model

CLIENTS = 8
MANY_CLIENTS = 16  # of the row in which as many again come late
OUTPUT_TOKENS = 48
RECOVERY_TIMEOUT_S = 240.0
NEIGHBOUR_TIMEOUT_S = 60.0  # of one request
console = Console(width=None if sys.stdout.isatty() else 170)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class OtherLifeError(Exception):
    """The server is not in the life that a row's faults were written for."""


@app.command()
def main(
    rows: Annotated[str, typer.Option(help="Which, comma-separated; `all`.")] = "all",
    requests: Annotated[int, typer.Option(min=32, help="In each row.")] = 800,
    output_tokens: Annotated[int, typer.Option(min=2)] = OUTPUT_TOKENS,
    port: Annotated[int, typer.Option(help="Of the servers; the next three are used too.")] = 8100,
    model_folder: Annotated[Path, typer.Option(help="Made where missing.")] = REPOSITORY
    / ".models"
    / "demo",
    output: Annotated[Path | None, typer.Option(help="A JSON file.")] = None,
) -> None:
    """One server for each group of rows, one load for each row; one table."""
    names = [*ROWS, *RAY_SERVERS] if rows == "all" else ["undisturbed", *rows.split(",")]
    unknown = set(names) - set(ROWS) - set(RAY_SERVERS)
    if unknown:
        known = ", ".join([*ROWS, *RAY_SERVERS])
        raise typer.BadParameter(f"unknown {', '.join(sorted(unknown))}; known: {known}")
    build_demo_model(model_folder)
    settings = Settings(model_folder=model_folder.resolve(), port=port, omp_threads=1)
    processes.adopt_orphans()
    signal.signal(signal.SIGTERM, _interrupt)
    date = datetime.now(UTC)
    bench = Bench(settings, requests=requests, output_tokens=output_tokens)
    path = output or REPOSITORY / "benchmarks" / "results" / f"faults-{date:%Y%m%d-%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        **report.surroundings(settings, command=sys.argv, date=date),
        "requests": requests,
        "output_tokens": output_tokens,
        "published": fault_report.published(),
    }
    own: list[Outcome] = []
    neighbours: list[Outcome] = []
    for group in groups(names):
        own += bench.run_group(group)
        _write(path, facts, own)
    for name in RAY_SERVERS:
        if name in names:
            neighbours.append(bench.run_neighbour(name))
            _write(path, facts, [*own, *neighbours])
    console.print(fault_report.table([*own, *neighbours]))
    console.print(f"Written to {path}")
    measured = [outcome for outcome in own if not outcome.note.startswith("skipped")]
    raise typer.Exit(0 if all(outcome.is_unharmed for outcome in measured) else 1)


def _write(path: Path, facts: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """After each group: the table takes half an hour, and what was measured is not to be lost."""
    rows = [fault_report.flat(outcome) for outcome in outcomes]
    path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


class Bench:
    """Runs rows; keeps the undisturbed answers, which all rows are compared with."""

    def __init__(self, settings: Settings, *, requests: int, output_tokens: int) -> None:
        self._settings = settings
        self._requests = requests
        self._output_tokens = output_tokens
        self._expected: dict[int, list[int]] = {}

    def run_group(self, rows: Sequence[Row]) -> list[Outcome]:
        """One server, or one more where a row left it in another life than planned."""
        outcomes = [_skipped(row) for row in rows if row.missing_settings]
        waiting = [row for row in rows if not row.missing_settings]
        while waiting:
            begun_with = len(waiting)
            try:
                with running(self._kind(waiting), self._settings) as server:
                    for row, life in zip(tuple(waiting), first_lives(waiting), strict=True):
                        outcomes.append(_print(self._run_row(row, server, life)))
                        waiting.remove(row)
            except OtherLifeError as error:
                if len(waiting) == begun_with:
                    outcomes.append(_print(_broken(waiting.pop(0), str(error))))
            except ServerFailedError as error:
                outcomes.append(_print(_broken(waiting.pop(0), str(error))))
        return outcomes

    def run_neighbour(self, name: str) -> Outcome:
        """Ray Serve LLM, its EngineCore killed."""
        kind = SERVERS[RAY_SERVERS[name]]
        row = Row(name=name, title=f"{kind.title}: EngineCore killed", blow=ROWS["core"].blow)
        missing = [package for package in ("pyarrow", "jsonref") if find_spec(package) is None]
        if missing:
            return _print(_broken(row, f"skipped: needs {', '.join(missing)}"))
        try:
            with running(kind, self._settings) as server:
                return _print(self._measure(row, server, timeout_s=NEIGHBOUR_TIMEOUT_S))
        except ServerFailedError as error:
            return _print(_broken(row, str(error)))

    def _kind(self, rows: Sequence[Row]) -> ServerKind:
        """`ballast serve` with one model, and the faults of these rows."""
        marked = fault_load.mark(self._marked_number())
        recovery = {"max_restarts": 100}
        for row in rows:
            recovery |= row.recovery
        changes = {"fault_injection": True, "faults": faults_of(rows, marked)}

        def command(settings: Settings, folder: Path) -> list[str]:
            config = yaml.safe_load((REPOSITORY / "serve_configs" / "dev.yaml").read_text())
            config["http_options"]["port"] = settings.port
            config["applications"] = [
                each for each in config["applications"] if each["name"] in ("gateway", "demo")
            ]
            config["applications"][1]["args"] |= {
                "model": str(settings.model_folder),
                "max_model_len": settings.max_model_len,
                "max_num_seqs": settings.max_num_seqs,
                "recovery": recovery,
                **changes,
            }
            path = folder / "faults.yaml"
            path.write_text(yaml.safe_dump(config, sort_keys=False))
            return [program("ballast"), "serve", str(path)]

        endpoint = Endpoint(name="ballast", ready_path="/demo/health")
        return ServerKind(title="Ballast", command=command, endpoints=(endpoint,))

    def _run_row(self, row: Row, server: RunningServer, life: int) -> Outcome:
        found = _status(server)["attempt"]
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
        victim = None if row.blow is None else _victim(row.blow)
        struck_at_s, answers = asyncio.run(_scenario(traffic, row.blow, victim))
        if row.name == "undisturbed":
            self._expected = {told.number: told.token_ids for told in answers if not told.failure}
        outcome = fault_report.counted(row, answers, self._expected)
        if struck_at_s is None:
            return outcome
        again_at_s = _first_success(answers, struck_at_s) or _probe(traffic)
        return replace(outcome, recovery_s=again_at_s - struck_at_s)

    def _marked_number(self) -> int:
        """Of the request that a fault waits for: a quarter into the load."""
        each = self._requests // CLIENTS
        return CLIENTS // 2 * each + each // 4


async def _scenario(
    traffic: Traffic, blow: Blow | None, victim: psutil.Process | None
) -> tuple[float | None, list[Told]]:
    """The blow falls when a quarter of the tokens of the early clients are there."""
    struck_at_s = None
    let_in = asyncio.Event()
    missing = traffic.clients * traffic.requests_per_client * traffic.output_tokens // 4

    def on_token() -> None:
        nonlocal struck_at_s, missing
        missing -= 1
        if missing == 0 and blow is not None and victim is not None:
            struck_at_s = time.time()
            victim.send_signal(signal.Signals[blow.signal_name])
            let_in.set()

    answers = await fault_load.run(traffic, on_token, let_in)
    return struck_at_s, answers


def _victim(blow: Blow) -> psutil.Process:
    name = ENGINE_CORE if blow.process == REPLICA else blow.process
    for process in processes.descendants():
        try:
            if " ".join(process.cmdline()).startswith(name):
                parent = process.parent()
                return parent if blow.process == REPLICA and parent is not None else process
        except psutil.NoSuchProcess:
            continue
    raise ServerFailedError(f"the server has no process {name}")


def _story(
    row: Row, status: dict[str, Any], first: int, seen_recovery_s: float | None
) -> dict[str, Any]:
    """What the server says of the row's lives: how they ended, and how long their loads took."""
    lives = [event for event in status["events"] if event["attempt"] >= first]
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


def _status(server: RunningServer) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/demo/status", timeout=30).raise_for_status()
    return dict(answer.json())


def _settled(server: RunningServer) -> dict[str, Any]:
    """The status, when nothing recovers any more."""
    deadline_s = time.monotonic() + RECOVERY_TIMEOUT_S
    while (status := _status(server))["state"] not in ("ready", "failed"):
        if time.monotonic() > deadline_s:
            raise ServerFailedError(f"still {status['state']} after {RECOVERY_TIMEOUT_S:.0f} s")
        time.sleep(0.2)
    return status


def _first_success(answers: Sequence[Told], struck_at_s: float) -> float | None:
    """When the first answer ended that was asked for after the blow."""
    ends = [t.ended_at_s for t in answers if t.sent_at_s > struck_at_s and t.failure is None]
    return min(ends, default=None)


def _probe(traffic: Traffic) -> float:
    """When a server answers again that failed all the rest of its load; infinite: it does not."""
    body = {"model": traffic.model, "prompt": "Hello", "max_tokens": 1}
    deadline_s = time.monotonic() + RECOVERY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            answer = httpx.post(f"{traffic.base_url}/completions", json=body, timeout=20)
            if answer.status_code == httpx.codes.OK:
                return time.time()
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    return math.inf


def _skipped(row: Row) -> Outcome:
    words = ", ".join(f"recovery.{name}" for name in row.missing_settings)
    return _print(_broken(row, f"skipped: this version has no {words}"))


def _broken(row: Row, note: str) -> Outcome:
    return Outcome(name=row.name, title=row.title, note=note)


def _print(outcome: Outcome) -> Outcome:
    console.print(fault_report.sentence(outcome), markup=False, highlight=False)
    return outcome


def _interrupt(signal_number: int, frame: object) -> None:
    """As Ctrl-C, so that the server under way is ended too."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    app()
