"""Kills, stops and starves the engine under load in every way, and counts what the clients saw.

    python -m benchmarks.faults

Each row is the load that NVIDIA publishes for Dynamo, 8 clients with 100 requests each, on the demo
model and a real server. Every token is compared with an undisturbed run. Ends with 1 if a row of
Ballast's has a failed request, or a lost or repeated token.
"""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import fault_report, processes, report
from benchmarks.dev_config import REPOSITORY
from benchmarks.fault_bench import Bench
from benchmarks.fault_report import Outcome
from benchmarks.fault_rows import RAY_SERVERS, ROWS, groups
from benchmarks.servers import Settings
from cluster.demo_model import build_demo_model

OUTPUT_TOKENS = 48
console = Console(width=None if sys.stdout.isatty() else 170)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


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
    processes.end_on_sigterm()
    date = datetime.now(UTC)
    bench = Bench(settings, requests=requests, output_tokens=output_tokens, say=_say)
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


def _say(outcome: Outcome) -> None:
    console.print(fault_report.sentence(outcome), markup=False, highlight=False)


if __name__ == "__main__":
    app()
