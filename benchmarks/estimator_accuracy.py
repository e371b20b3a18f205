"""Estimate against measurement, item by item, for every measured load; other formulas beside.

    python -m benchmarks.estimator_accuracy             # both halves, limits on the report half
    python -m benchmarks.estimator_accuracy --markdown  # the report half, as docs/memory.md has it
    python -m benchmarks.estimator_accuracy --fit       # the constants, fitted on the fit half
    python -m benchmarks.estimator_accuracy --json

Exit code 1 when a limit of the report half is not kept.
"""

import argparse
import json
import sys
import timeit
from pathlib import Path

from benchmarks import estimator_tables as tables
from benchmarks.estimator_baselines import errors
from benchmarks.estimator_fit import print_fit
from benchmarks.estimator_limits import LIMITS, Comparison, compared, kept
from benchmarks.estimator_loads import Load, device, fitted, read_loads
from vram.estimate import estimate


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("files", nargs="*", type=Path, help="instead of results/memory_*.jsonl")
    arguments.add_argument("--fit", action="store_true", help="fit the constants on the fit half")
    arguments.add_argument("--markdown", action="store_true")
    arguments.add_argument("--json", action="store_true")
    options = arguments.parse_args()
    loads = read_loads(options.files or None)
    if options.fit:
        print_fit(fitted(loads, "fit"))
        return
    comparisons = {half: compared(fitted(loads, half)) for half in ("fit", "report")}
    if options.json:
        print(json.dumps(as_dict(comparisons), indent=1))
    elif options.markdown:
        print(tables.markdown(comparisons))
    else:
        for half, found in comparisons.items():
            tables.print_half(half, found)
        tables.print_failures([load for load in loads if load.failure])
        tables.print_others(comparisons["report"])
        slowest_ms = max(milliseconds(load) for load in fitted(loads, "report"))
        print(f"\nslowest estimate once its config is read: {slowest_ms:.2f} ms (limit 1 ms)")
    broken = [limit.item for limit in LIMITS if not kept(comparisons["report"], limit)]
    if broken:
        sys.exit(f"outside the limits on the report half: {', '.join(broken)}")


def milliseconds(load: Load) -> float:
    """One estimate of a shape that is known, the best of five runs of ten."""
    shape, settings, card = load.shape, load.settings, device()
    runs = timeit.repeat(lambda: estimate(shape, settings, card), number=10, repeat=5)
    return min(runs) / 10 * 1000


def as_dict(comparisons: dict[str, list[Comparison]]) -> dict[str, object]:
    return {
        half: {
            "loads": [
                {
                    "load": c.load.name,
                    "estimated": c.estimated,
                    "measured": c.load.measured,
                    "errors_of_formulas": errors(c.load, device()),
                }
                for c in found
            ],
            "limits": {
                limit.item: {
                    "errors": [c.error(limit) for c in found],
                    "kept": kept(found, limit),
                }
                for limit in LIMITS
            },
        }
        for half, found in comparisons.items()
    }


if __name__ == "__main__":
    main()
