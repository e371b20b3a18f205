"""What became of a row of `benchmarks.faults`, as one line of its table and of its JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from benchmarks.fault_load import Told, difference
from benchmarks.fault_rows import ROWS, Row

# NVIDIA's own table for Dynamo 1.6, in its pages on fault tolerance, by its names of deployment
# and victim, read 2026-11: 8 x L40, DeepSeek-R1-Distill-Llama-8B, 8 clients with 100 requests each.
DYNAMO = (
    ("Dynamo, published: agg-tp2-dp1, decode_worker", 520, 280, 37.99),
    ("Dynamo, published: agg-tp2-dp1, vllm_worker", 120, 680, math.inf),
    ("Dynamo, published: agg-tp2-dp4", 796, 4, 44.88),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One row, measured. Times in seconds."""

    name: str
    title: str
    requests: int = 0
    ok: int = 0
    failed: int = 0
    lost_tokens: int = 0
    repeated_tokens: int = 0
    reconnects: int = 0
    longest_pause_s: float | None = None
    recovery_s: float | None = None  # from the blow, or the first death, until it serves; inf: not
    own_start_s: float | None = None  # of it the engine's own: its loads, failed ones too
    deaths: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # the first three, in words
    note: str = ""

    @property
    def beyond_start_s(self) -> float | None:
        """What the client waited beyond the engine's own loads."""
        row = ROWS.get(self.name)
        no_client_waits = row is not None and row.dies_before_load
        waited_s = self.recovery_s if no_client_waits else self.longest_pause_s
        if waited_s is None or self.own_start_s is None:
            return None
        return waited_s - self.own_start_s

    @property
    def is_unharmed(self) -> bool:
        harm = (self.failed, self.lost_tokens, self.repeated_tokens)
        return self.ok == self.requests > 0 and harm == (0, 0, 0)


def counted(row: Row, answers: Sequence[Told], expected: Mapping[int, Sequence[int]]) -> Outcome:
    differences = [difference(expected.get(t.number, ()), t.token_ids) for t in answers]
    failures = [f"request {told.number}: {told.failure}" for told in answers if told.failure]
    return Outcome(
        name=row.name,
        title=row.title,
        requests=len(answers),
        ok=len(answers) - len(failures),
        failed=len(failures),
        lost_tokens=sum(lost for lost, _ in differences),
        repeated_tokens=sum(repeated for _, repeated in differences),
        reconnects=sum(told.reconnects for told in answers),
        longest_pause_s=max(told.longest_pause_s for told in answers),
        failures=failures[:3],
    )


def sentence(outcome: Outcome) -> str:
    numbers = f"{outcome.ok} ok, {outcome.failed} failed, {outcome.lost_tokens} lost, "
    numbers += f"{outcome.repeated_tokens} repeated, pause {_seconds(outcome.longest_pause_s)} s"
    words = [numbers] if outcome.requests else []
    words += [outcome.note] if outcome.note else []
    return f"{outcome.name}: {'; '.join([*words, *outcome.failures])}"


def table(outcomes: Sequence[Outcome]) -> Table:
    result = Table(
        caption="Seconds. Pause: the longest that a client waited for a byte. Recovers: from the "
        "blow or death to the first answer, or to serving. Beyond: what a client waited beyond "
        "the engine's own loads."
    )
    result.add_column("row")
    for heading in ("ok", "failed", "lost", "repeated", "pause", "recovers", "beyond", "retried"):
        result.add_column(heading, justify="right")
    result.add_column("deaths")
    for outcome in outcomes:
        numbers = [outcome.ok, outcome.failed, outcome.lost_tokens, outcome.repeated_tokens]
        seconds = [outcome.longest_pause_s, outcome.recovery_s, outcome.beyond_start_s]
        counted = [str(number) if outcome.requests else "-" for number in numbers]
        told = [*outcome.deaths, outcome.note] if outcome.note else outcome.deaths
        result.add_row(
            outcome.title, *counted, *map(_seconds, seconds), str(outcome.reconnects),
            "; ".join(told),
        )  # fmt: skip
    result.add_section()
    for title, ok, failed, recovery_s in DYNAMO:
        result.add_row(title, str(ok), str(failed), "-", "-", "-", _seconds(recovery_s), "-", "-")
    return result


def flat(outcome: Outcome) -> dict[str, Any]:
    return {
        **asdict(outcome),
        "recovery_s": _finite(outcome.recovery_s),
        "recovers": outcome.recovery_s is None or math.isfinite(outcome.recovery_s),
        "beyond_start_s": outcome.beyond_start_s,
    }


def published() -> list[dict[str, Any]]:
    return [
        {"title": title, "ok": ok, "failed": failed, "recovery_s": _finite(seconds)}
        for title, ok, failed, seconds in DYNAMO
    ]


def _seconds(value: float | None) -> str:
    return "-" if value is None else "never" if math.isinf(value) else f"{value:.1f}"


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None
