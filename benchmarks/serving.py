"""Puts the same load on Ballast and on its neighbours, one after the other, and compares.

    python -m benchmarks.serving --rounds 3
    python -m benchmarks.serving --rounds 9 --by-turns --servers vllm,ballast

What is measured and what is not: benchmarks/README.md.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import processes, report
from benchmarks.dev_config import REPOSITORY
from benchmarks.load import ENDPOINTS, Load
from benchmarks.load_result import LoadResult
from benchmarks.servers import (
    SERVERS,
    Endpoint,
    RunningServer,
    ServerFailedError,
    ServerKind,
    Settings,
    all_running,
    paused,
    running,
)
from cluster.demo_model import build_demo_model

REQUESTS_AT = {1: 24, 16: 160, 64: 384}  # by concurrency: about ten seconds each
WARM_UP_REQUESTS, WARM_UP_LIMIT = 4, 128  # by concurrency
COMMON_MODEL = "demo"
BUSY_LIMIT = 0.05  # of all cores, before a server starts
SETTLE_S = 5.0  # Ray has things to do when it goes on after a pause
# Wide where it goes to a file: a table cut to 80 columns says nothing.
console = Console(width=None if sys.stdout.isatty() else 150)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    servers: Annotated[str, typer.Option(help="Which, comma-separated.")] = ",".join(SERVERS),
    rounds: Annotated[int, typer.Option(min=1, help="The medians are printed.")] = 1,
    concurrency: Annotated[str, typer.Option(help="Comma-separated.")] = "1,16,64",
    load_scale: Annotated[float, typer.Option(help="Multiplies the requests.")] = 1.0,
    api: Annotated[str, typer.Option(help=" or ".join(ENDPOINTS))] = "completions",
    output_tokens: Annotated[int, typer.Option(min=2)] = 64,
    ballast_url: Annotated[
        str | None, typer.Option(help="A Ballast that runs; its memory is not measured.")
    ] = None,
    port: Annotated[int, typer.Option(help="Of the servers; the next three are used too.")] = 8100,
    max_num_seqs: Annotated[int, typer.Option(min=1)] = 64,
    omp_threads: Annotated[int, typer.Option(min=1, help="Of each engine.")] = 1,
    model_folder: Annotated[Path, typer.Option(help="Made where missing.")] = REPOSITORY
    / ".models"
    / "demo",
    by_turns: Annotated[
        bool, typer.Option(help="All run from the first to the last round; who waits is paused.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Default: in benchmarks/results.")] = None,
) -> None:
    """The same load on each server, one after the other; one table."""
    kinds = _chosen(servers)
    levels = [int(level) for level in concurrency.split(",")]
    if api not in ENDPOINTS:
        raise typer.BadParameter(f"{api} is not one of {', '.join(ENDPOINTS)}")
    if by_turns and ballast_url:
        raise typer.BadParameter(
            "--by-turns pauses servers, so it starts all of them: no --ballast-url"
        )
    build_demo_model(model_folder)
    settings = Settings(
        model_folder=model_folder.resolve(),
        port=port,
        max_num_seqs=max_num_seqs,
        omp_threads=omp_threads,
    )
    processes.adopt_orphans()
    processes.end_on_sigterm()
    date = datetime.now(UTC)
    rounds_of_plans = [
        [
            Load(
                base_url="",
                model="",
                api=api,
                concurrency=level,
                num_requests=round(REQUESTS_AT.get(level, 6 * level) * load_scale),
                output_tokens=output_tokens,
                seed=1000 * number + level,
            )
            for level in levels
        ]
        for number in range(rounds)
    ]
    if by_turns:
        try:
            measurements, failed = _by_turns(kinds, settings, rounds_of_plans), False
        except ServerFailedError as failure:
            console.print(f"ended: {failure}", markup=False, highlight=False)
            raise typer.Exit(1) from None
    else:
        measurements, failed = _one_by_one(kinds, settings, rounds_of_plans, ballast_url)
    if not measurements:
        raise typer.Exit(1)
    document = report.document(measurements, settings, command=sys.argv, date=date)
    path = output or REPOSITORY / "benchmarks" / "results" / f"serving-{date:%Y%m%d-%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    console.print(report.table(measurements))
    console.print(f"Written to {path}")
    raise typer.Exit(1 if failed else 0)


def _one_by_one(
    kinds: dict[str, ServerKind],
    settings: Settings,
    rounds: list[list[Load]],
    ballast_url: str | None,
) -> tuple[list[report.Measurement], bool]:
    """Each server has the machine for itself; and whether one of them did not start."""
    measurements: list[report.Measurement] = []
    failed = False
    for number, plans in enumerate(rounds):
        for name, kind in kinds.items():
            server = (
                _existing(ballast_url)
                if ballast_url and name == "ballast"
                else running(kind, settings)
            )
            busy = processes.busy_share()
            console.print(f"round {number + 1}/{len(rounds)}: {kind.title}", style="bold")
            _warn_of(busy)
            try:
                measurements += _measure(kind, server, plans, number, busy)
            except ServerFailedError as failure:
                failed = True
                console.print(f"left out: {failure}", markup=False, highlight=False)
    return measurements, failed


def _by_turns(
    kinds: dict[str, ServerKind], settings: Settings, rounds: list[list[Load]]
) -> list[report.Measurement]:
    """On a processor that is faster in one minute than in the next: a turn takes half a minute."""
    measurements: list[report.Measurement] = []
    with all_running(list(kinds.values()), settings) as servers:
        for number, plans in enumerate(rounds):
            # Who is first in one round is last in the next.
            for kind, server in servers[:: 1 - 2 * (number % 2)]:
                console.print(f"round {number + 1}/{len(rounds)}: {kind.title}", style="bold")
                with paused([other for _, other in servers if other is not server]):
                    time.sleep(SETTLE_S)
                    busy = processes.busy_share()
                    _warn_of(busy)
                    measurements += _measure(kind, nullcontext(server), plans, number, busy)
    return measurements


def _warn_of(busy: float) -> None:
    if busy > BUSY_LIMIT:
        console.print(f"  others keep this machine {busy:.0%} busy: no fair figures")


def _chosen(names: str) -> dict[str, ServerKind]:
    unknown = set(names.split(",")) - set(SERVERS)
    if unknown:
        raise typer.BadParameter(f"unknown {', '.join(unknown)}; known: {', '.join(SERVERS)}")
    return {name: SERVERS[name] for name in names.split(",")}


@contextmanager
def _existing(url: str) -> Iterator[RunningServer]:
    yield RunningServer(url=url.rstrip("/").removesuffix("/v1"), started_in_s=None)


def _measure(
    kind: ServerKind,
    server: AbstractContextManager[RunningServer],
    plans: list[Load],
    round_number: int,
    busy_before: float,
) -> list[report.Measurement]:
    measurements = []
    with server as running_server:
        for endpoint in kind.endpoints:
            results = []
            for plan in plans:
                load = replace(
                    plan,
                    base_url=running_server.url + endpoint.path,
                    model=endpoint.model,
                    num_requests=max(1, round(plan.num_requests * endpoint.load_share)),
                )
                fewer = min(WARM_UP_REQUESTS * load.concurrency, WARM_UP_LIMIT, load.num_requests)
                run_load(replace(load, num_requests=fewer, seed=-load.seed))
                results.append(run_load(load))
                console.print("  " + report.sentence(endpoint, results[-1]), highlight=False)
            measurements.append(
                report.Measurement(
                    round=round_number,
                    endpoint=endpoint,
                    busy_before=busy_before,
                    started_in_s=running_server.started_in_s,
                    loads=results,
                    memory=_memory(running_server, endpoint),
                )
            )
    return measurements


def _memory(server: RunningServer, endpoint: Endpoint) -> processes.Memory | None:
    """Of the server that we started, for the model that all of them serve."""
    if server.mark is None or endpoint.model != COMMON_MODEL:
        return None
    return processes.measure(server.mark)


def run_load(load: Load) -> LoadResult:
    """In a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.load"],
        input=json.dumps(asdict(load)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    return LoadResult(**json.loads(finished.stdout))


if __name__ == "__main__":
    app()
