"""Least squares for the constants of vram/overhead.py, on the loads of the fit half only.

Prints what they would be; nobody's file is changed. Forms are read from vLLM's source; only their
factors are fitted.
"""

import math
from collections.abc import Sequence

from benchmarks.estimator_loads import Load, device
from vram import graphs
from vram.allocator import batch_blocks_bytes
from vram.overhead import newer_runner
from vram.units import GIB, MIB

# The device's use may be 2 % above the measurement and 1 % below: the middle is aimed at.
AIM = 0.005


def print_fit(loads: list[Load]) -> None:
    """The factors of CUDA graphs and of the allocator's slack."""
    print(f"{len(loads)} loads of the fit half")
    graphs, mean = fit_graphs(loads)
    print("cuda_graphs: base MiB, copies of the outputs of splits in the newer runner")
    print("   ", [round(factor, 4) for factor in graphs], f"mean error {mean:.3f} GiB")
    kept, mean = fit_kept_blocks(loads)
    print("allocator_slack: base GiB")
    print("   ", [round(factor, 3) for factor in kept], f"mean error {mean:.2%}")
    print("    each load left out in turn:", f"{left_out(loads):.2%} root of mean squares")


def fit_graphs(loads: list[Load]) -> tuple[list[float], float]:
    """The pool's part, after the driver's part that grows with layers and captures."""
    rows, wanted = [], []
    for load in loads:
        if load.settings.enforce_eager or not newer_runner(load.shape, device(), "vllm"):
            continue
        driver_bytes = graphs.driver_bytes(load.shape, load.settings)
        rows.append([1.0, graphs.split_outputs_bytes(load.shape, load.settings) / MIB])
        wanted.append((load.measured["cuda_graphs"] * GIB - driver_bytes) / MIB)
    factors = least_squares(rows, wanted)
    return factors, _mean(rows, wanted, factors) * MIB / GIB


def fit_kept_blocks(loads: list[Load]) -> tuple[list[float], float]:
    """What the device held beyond everything else that is estimated."""
    rows, wanted = kept_blocks_equations(loads)
    factors = least_squares(rows, wanted)
    return factors, _mean(rows, wanted, factors)


def left_out(loads: list[Load]) -> float:
    """The error on each load with the constants that the others give."""
    rows, wanted = kept_blocks_equations(loads)
    squares = []
    for index in range(len(rows)):
        others = [*rows[:index], *rows[index + 1 :]], [*wanted[:index], *wanted[index + 1 :]]
        factors = least_squares(*others)
        squares.append(_mean([rows[index]], [wanted[index]], factors) ** 2)
    return math.sqrt(sum(squares) / len(squares))


def kept_blocks_equations(loads: list[Load]) -> tuple[list[list[float]], list[float]]:
    """Of each load: the base's share of the device, and what it should be."""
    rows, wanted = [], []
    for load in loads:
        found = load.estimated(device())
        known_bytes = (
            found.device_use_under_load_bytes
            - found.item("allocator_slack").bytes
            - found.item("peak_activation").bytes
            + batch_blocks_bytes(load.shape, load.settings, device(), "vllm")
        )
        measured_gib = load.measured["device"]
        # The limit is relative, so a small budget weighs as much as a whole card.
        rows.append([1 / measured_gib])
        wanted.append(1 + AIM - known_bytes / GIB / measured_gib)
    return rows, wanted


def least_squares(rows: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:
    """Normal equations, solved by elimination: three unknowns need no library."""
    count = len(rows[0])
    matrix = [
        [sum(row[i] * row[j] for row in rows) for j in range(count)]
        + [sum(row[i] * value for row, value in zip(rows, wanted, strict=True))]
        for i in range(count)
    ]
    for i in range(count):
        pivot = max(range(i, count), key=lambda k: abs(matrix[k][i]))
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        for k in range(count):
            if k != i:
                factor = matrix[k][i] / matrix[i][i]
                matrix[k] = [a - factor * b for a, b in zip(matrix[k], matrix[i], strict=True)]
    return [matrix[i][count] / matrix[i][i] for i in range(count)]


def _mean(
    rows: Sequence[Sequence[float]], wanted: Sequence[float], factors: Sequence[float]
) -> float:
    errors = [
        abs(sum(f * x for f, x in zip(factors, row, strict=True)) - value)
        for row, value in zip(rows, wanted, strict=True)
    ]
    return sum(errors) / len(errors)
