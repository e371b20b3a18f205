"""The estimator's accuracy as text and as Markdown. Judges nothing."""

from collections.abc import Iterator, Sequence

from benchmarks.estimator_baselines import FORMULAS, ITEMS, errors
from benchmarks.estimator_limits import LIMITS, Comparison, Limit
from benchmarks.estimator_loads import Load, device
from vram.errors import Invalid

COLUMNS = {
    "weights": "weights",
    "peak_activation": "activation",
    "cuda_graphs": "graphs",
    "non_torch": "non-torch",
    "device": "device",
    "device_hard": "hardest",
}
ITEM_NAMES = {"weights": "weights", "kv_cache_tokens": "KV tokens", "needed": "needed in all"}


def print_half(half: str, found: list[Comparison]) -> None:
    print(f"\n== {half} half, {len(found)} loads: estimate / measured, GiB; KV tokens: error")
    for comparison in found:
        print(f"{comparison.load.name:72} {'  '.join(_cells(comparison, ' '))}")
    for limit in LIMITS:
        print(f"  {limit.item:16} {_summary(found, limit)}")


def print_failures(failures: list[Load]) -> None:
    print(f"\n== {len(failures)} loads that failed: what vLLM said, what the estimate says before")
    for load in failures:
        print(f"{load.name}\n    vLLM: {load.failure[:110]}\n    ours: {_refused(load)}")


def print_others(found: list[Comparison]) -> None:
    """Errors of each formula on what it claims to know."""
    for item in ITEMS:
        print(f"\n== report half, {ITEM_NAMES[item]}: errors of {', '.join(FORMULAS)}")
        for comparison in found:
            said = errors(comparison.load, device())
            cells = [_percent(said[name][item]) for name in FORMULAS]
            print(f"{comparison.load.name:72} {' '.join(f'{cell:>9}' for cell in cells)}")
    print("\n== report half: smallest, largest and mean size of the errors")
    for name, item, range_, mean in _ranges(found):
        print(f"  {name:28} {ITEM_NAMES[item]:14} {range_:>24} {mean:>8}")


def markdown(comparisons: dict[str, list[Comparison]]) -> str:
    """The report half, its limits and the other formulas."""
    found = comparisons["report"]
    head = ["load", "KV tokens", *COLUMNS.values()]
    lines = [_row(head), _row(["---"] * len(head))]
    for comparison in found:
        *sizes, tokens = _cells(comparison, "")
        lines.append(_row([comparison.load.name, tokens, *sizes]))
    lines += ["", _row(["item", "report half", "fit half", "within its limit"]), _row(["---"] * 4)]
    for limit in LIMITS:
        within = sum(limit.kept(comparison.error(limit)) for comparison in found)
        halves = (_extremes(comparisons[half], limit) for half in ("report", "fit"))
        lines.append(_row([f"`{limit.item}`", *halves, f"{within} of {len(found)}"]))
    lines += ["", _row(["formula", "of", "errors", "mean size"]), _row(["---"] * 4)]
    lines += [
        _row([name, ITEM_NAMES[item], range_, mean]) for name, item, range_, mean in _ranges(found)
    ]
    return "\n".join(lines)


def _cells(comparison: Comparison, space: str) -> Iterator[str]:
    """Sizes, and the tokens' error last."""
    ours, theirs = comparison.estimated, comparison.load.measured
    for item, name in COLUMNS.items():
        label = f"{name} " if space else ""
        width = 6 if space else 0
        measured = f"{theirs[item]:.2f}" if item in theirs else "–"
        yield f"{label}{ours[item]:{width}.2f} / {measured:>{width}}"
    yield _percent(ours["kv_cache_tokens"] / theirs["kv_cache_tokens"] - 1)


def _summary(found: list[Comparison], limit: Limit) -> str:
    if not found:
        return "nothing measured"
    sizes = [abs(comparison.error(limit)) for comparison in found]
    within = sum(limit.kept(comparison.error(limit)) for comparison in found)
    mean = limit.text(sum(sizes) / len(sizes))[1:]
    return f"{_extremes(found, limit):>32}  mean size {mean:>10}  within {within}/{len(found)}"


def _extremes(found: list[Comparison], limit: Limit) -> str:
    sizes = [comparison.error(limit) for comparison in found]
    return f"{limit.text(min(sizes))} … {limit.text(max(sizes))}" if sizes else "nothing measured"


def _ranges(found: list[Comparison]) -> Iterator[tuple[str, str, str, str]]:
    said = [errors(comparison.load, device()) for comparison in found]
    for name in FORMULAS:
        for item in ITEMS:
            sizes = [size for each in said if (size := each[name][item]) is not None]
            if sizes:
                mean = sum(abs(size) for size in sizes) / len(sizes)
                range_ = f"{min(sizes):+.1%} … {max(sizes):+.1%}"
                yield name, item, range_, f"{mean:.1%}"


def _refused(load: Load) -> str:
    try:
        return load.estimated(device()).reason or "IT WOULD FIT"
    except Invalid as error:
        return str(error)


def _percent(error: float | None) -> str:
    return "–" if error is None else f"{error:+.2%}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
