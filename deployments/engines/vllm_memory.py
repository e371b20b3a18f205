"""What vLLM says of its own memory while it loads, in its log: read, and kept inside its processes.

The texts are those of vLLM 0.26 to 0.29 (v1/worker/gpu_worker.py, gpu_model_runner.py,
cpu_worker.py, core/kv_cache_utils.py). Sizes there are GiB rounded to 0.01.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from vram.units import gib_to_bytes

_GIB = {
    "weights": re.compile(r"Model loading took ([\d.]+) GiB"),
    "peak_activation": re.compile(r"([\d.]+) ?GiB for peak activation"),
    "non_torch": re.compile(r"([\d.]+) GiB for non-torch"),
    "cuda_graphs": re.compile(r"Graph capturing finished in [\d.]+ secs?, took ([\d.]+) GiB"),
    "kv_cache": re.compile(
        r"Available KV cache memory: ([\d.]+) GiB|(?:Explicitly|Auto) set \(([\d.]+)/[\d.]+\) GiB "
        r"for KV cache"
    ),
    # vLLM 0.29 has weights and non-torch in one number.
    "consumed": re.compile(r"([\d.]+) GiB for consumed memory"),
}
_TOKENS = re.compile(r"GPU KV cache size: ([\d,]+) tokens")
_SPEAKS_OF_MEMORY = re.compile(r"GiB|KV cache size")


def reported(lines: Iterable[str]) -> dict[str, int]:
    """Bytes per GPU by the names of an estimate's items, and `kv_cache_tokens`; what was not said
    is not there.

    Where several workers speak, the fullest one counts; of the cache, the smallest.
    """
    sizes: dict[str, list[float]] = {}
    tokens = []
    for line in lines:
        for name, pattern in _GIB.items():
            for match in pattern.finditer(line):
                sizes.setdefault(name, []).append(float(next(filter(None, match.groups()))))
        tokens += [int(found.replace(",", "")) for found in _TOKENS.findall(line)]
    found = {
        name: gib_to_bytes(min(values) if name == "kv_cache" else max(values))
        for name, values in sizes.items()
    }
    consumed_bytes = found.pop("consumed", None)
    if consumed_bytes is not None and "weights" in found and "non_torch" not in found:
        found["non_torch"] = max(consumed_bytes - found["weights"], 0)
    if tokens:
        found["kv_cache_tokens"] = min(tokens)
    return found


def read_reported(path: Path) -> dict[str, int]:
    """From the file that `MemoryLines` wrote; empty where there is none."""
    try:
        return reported(path.read_text(encoding="utf-8", errors="replace").splitlines())
    except FileNotFoundError:
        return {}


def lines_beside(black_box: Path) -> Path:
    """Where the processes of a life keep what they say of memory."""
    return black_box.with_name("memory.txt")


def keep_memory_lines(black_box: Path) -> None:
    """Inside vLLM's processes: from now on, its lines about memory go to a file of the life."""
    logging.getLogger("vllm").addHandler(MemoryLines(lines_beside(black_box)))


class MemoryLines(logging.Handler):
    """Keeps the lines of a log that speak of memory."""

    def __init__(self, path: Path) -> None:
        super().__init__(level=logging.INFO)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if record.levelno < logging.ERROR and _SPEAKS_OF_MEMORY.search(line):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(" ".join(line.split()) + "\n")
