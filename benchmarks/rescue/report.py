"""The table of a campaign: what each mode rescued, what it kept, how long it took.

python -m benchmarks.rescue.report benchmarks/results/h200_rescue.json
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rescue.cases import CASES, ENDS, Outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a line a case, a column a mode, then the sums."""
    modes = list(dict.fromkeys(outcome.mode for outcome in outcomes))
    by_key = {(outcome.case, outcome.mode): outcome for outcome in outcomes}
    lines = ["| load | " + " | ".join(modes) + " |", "|---" * (len(modes) + 1) + "|"]
    for case in CASES:
        cells = [_cell(by_key.get((case.name, mode))) for mode in modes]
        has_none = " (no setting works)" if case.expected == ENDS else ""
        lines.append(f"| {case.name}{has_none} | " + " | ".join(cells) + " |")
    sums = []
    for mode in modes:
        own = [outcome for outcome in outcomes if outcome.mode == mode]
        sums.append(f"{sum(outcome.served for outcome in own)} of {len(own)} serve")
    lines.append("| **all** | " + " | ".join(sums) + " |")
    return "\n".join(lines)


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return "not run"
    if outcome.reason.startswith("cut off"):
        return f"no end within {outcome.seconds:.0f} s"
    if not outcome.served:
        return f"fails after {outcome.seconds:.0f} s" + _requests(outcome)
    kept = f"context {outcome.max_model_len}, {outcome.kv_cache_tokens or 0:,} KV tokens"
    lives = f", life {len(outcome.steps)}" if len(outcome.steps) > 1 else ""
    return f"serves after {outcome.seconds:.0f} s{lives}: {kept}" + _requests(outcome)


def _requests(outcome: Outcome) -> str:
    total = outcome.requests_ok + outcome.requests_failed
    return f"; {outcome.requests_failed} of {total} requests failed" if total > 1 else ""


if __name__ == "__main__":
    document = json.loads(Path(sys.argv[1]).read_text())
    print(table([Outcome(**outcome) for outcome in document["outcomes"]]))
