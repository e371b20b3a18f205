"""Runs the cases one after another on this host's GPUs and appends each finished one to a file.

Each load is a process group of its own, ended after the case; the next starts when the device's
memory is back, since an engine that was left alone keeps its memory for ever.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import pynvml

from benchmarks.memory import vllm_log
from benchmarks.memory.cases import LISTS, Case
from benchmarks.memory.load import devices_used_bytes
from benchmarks.memory.models import CONFIGS
from benchmarks.memory.worker_notes import NOTES_PATH, read_notes

GIB = 2**30
CASE_LIMIT_S = 170.0
FAILURES_IN_A_ROW = 3  # the lists never expect as many: something else is wrong
IMPORTS_AHEAD = 2  # an import takes longer than a load that fails at once
MEMORY_BACK_S = 30.0
MEMORY_BACK_BYTES = GIB // 2
SAMPLING_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A load that imports while the one before it runs."""

    case: Case
    process: subprocess.Popen[str]
    log: IO[str]
    folder: Path


def main() -> None:
    options = _arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    known = {
        json.loads(line)["case"] for path in options.known for line in path.read_text().splitlines()
    }
    todo = [case for case in LISTS[options.cases] if case.name not in known]
    write_models(options.work / "models", {case.model for case in todo})
    host = describe_host()
    deadline = time.monotonic() + options.limit_s
    baseline = devices_used_bytes()
    todo = todo[: options.count]
    rows: list[dict[str, Any]] = []
    failures = 0
    waiting: list[Running] = []
    while waiting := prepare(waiting, todo, options.work, deadline):
        running = waiting.pop(0)
        begun = time.monotonic()
        with PeakUse() as peak:
            assert running.process.stdin is not None
            running.process.stdin.write("go\n")
            running.process.stdin.flush()
            prepare(waiting, todo, options.work, deadline - running.case.expected_s)
            limit_s = min(CASE_LIMIT_S, deadline - time.monotonic())
            timed_out = not _wait(running.process, limit_s)
        end(running)
        row = {
            **record(running, baseline),
            **host,
            "environment": {**host["environment"], **running.case.environment},
            "device_peak_bytes": [
                most - before for most, before in zip(peak.most, baseline, strict=True)
            ],
            "timed_out": timed_out,
            "wall_s": round(time.monotonic() - begun, 1),
        }
        if timed_out and time.monotonic() >= deadline:
            print("time is up during", running.case.name)
        else:
            rows.append(row)
            failures = failures + 1 if row.get("failed_stage") == "start" else 0
            with options.results.open("a") as results:
                results.write(json.dumps(row) + "\n")
            print(summary(row), flush=True)
        if not memory_is_back(baseline):
            print("the device's memory did not come back:", devices_used_bytes(), baseline)
            break
        if failures == FAILURES_IN_A_ROW:
            print("stopped after", failures, "loads in a row that did not start")
            break
    for running in waiting:
        end(running)
    if options.logs is not None:
        with tarfile.open(options.logs, "w:xz") as archive:
            archive.add(options.work / "loads", arcname="loads")
    print(*(summary(row) for row in rows), sep="\n")


def prepare(waiting: list[Running], todo: list[Case], work: Path, deadline: float) -> list[Running]:
    """Move cases that should still end in time from `todo` to `waiting`, their imports started."""
    while len(waiting) < IMPORTS_AHEAD:
        left_s = deadline - time.monotonic() - sum(each.case.expected_s for each in waiting)
        case = next((case for case in todo if case.expected_s <= left_s), None)
        if case is None:
            break
        todo.remove(case)
        waiting.append(start(case, work))
    return waiting


def start(case: Case, work: Path) -> Running:
    loads = work / "loads"
    loads.mkdir(exist_ok=True)
    folder = loads / f"{len(list(loads.iterdir())):03}-{case.model}"
    folder.mkdir()
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "benchmarks.memory.load",
            str(work / "models" / case.model),
            json.dumps(case.engine_args),
            str(folder / "facts.json"),
        ],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        env={**os.environ, **case.environment, NOTES_PATH: str(folder / "notes")},
    )
    return Running(case=case, process=process, log=log, folder=folder)


def end(running: Running) -> None:
    """The whole group: an engine outlives the parent that started it."""
    with suppress(ProcessLookupError):  # it ended by itself, with all that it started
        os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()
    running.log.close()


def record(running: Running, baseline: list[int]) -> dict[str, Any]:
    """One line of results: the keys of evidence, then exact bytes."""
    facts_path = running.folder / "facts.json"
    facts = json.loads(facts_path.read_text()) if facts_path.exists() else {}
    log = (running.folder / "log").read_text(errors="replace")
    numbers = vllm_log.numbers(log)
    row: dict[str, Any] = {
        "case": running.case.name,
        "model": running.case.model,
        "args": running.case.engine_args,
    }
    row.update({name: value for name, value in numbers.items() if not name.endswith("_s")})
    stages = [
        {
            **stage,
            "device_used_bytes": [
                used - before
                for used, before in zip(stage["device_used_bytes"], baseline, strict=True)
            ],
        }
        for stage in facts.get("stages", [])
    ]
    for stage, key in (("loaded", "load"), ("requests_64", "64_requests"), ("hard", "hard_load")):
        used = [max(each["device_used_bytes"]) for each in stages if each["stage"] == stage]
        if used:
            row[f"device_used_after_{key}_gib"] = round(used[0] / GIB, 3)
    if "error" in facts:
        row["error_seen_by_parent"] = facts["error"]
        row["error_type"] = facts["error_type"]
        row["failed_stage"] = facts.get("stage", "start")
        row["root_cause"] = vllm_log.root_cause(log) or facts["error"]
        row["error_lines"] = vllm_log.error_lines(log)
    times = {name: value for name, value in numbers.items() if name.endswith("_s")}
    times.update({name: facts[name] for name in facts if name.endswith("_s")})
    return {
        **row,
        "settings": facts.get("settings"),
        "ranks": read_notes(running.folder / "notes"),
        "stages": stages,
        "device_baseline_bytes": baseline,
        **times,
        **vllm_log.words(log),
        "memory_lines": vllm_log.memory_lines(log),
        "config": CONFIGS[running.case.model],
    }


def describe_host() -> dict[str, Any]:
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "engine": f"vllm {version('vllm')}",
        "gpu": pynvml.nvmlDeviceGetName(handle),
        "num_gpus": pynvml.nvmlDeviceGetCount(),
        "gpu_total_nvml_bytes": memory.total,
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("VLLM_", "NCCL_", "TORCH_SYMM", "PYTORCH_"))
        },
    }


def write_models(root: Path, names: set[str]) -> None:
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "config.json").write_text(json.dumps(CONFIGS[name], indent=1))


def memory_is_back(baseline: list[int]) -> bool:
    patience = time.monotonic() + MEMORY_BACK_S
    while time.monotonic() < patience:
        used = zip(devices_used_bytes(), baseline, strict=True)
        if all(now - before < MEMORY_BACK_BYTES for now, before in used):
            return True
        time.sleep(0.2)
    return False


class PeakUse:
    """The most that each device held while it was watched, read every SAMPLING_S."""

    def __init__(self) -> None:
        self.most = devices_used_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakUse":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLING_S):
            used = devices_used_bytes()
            self.most = [max(pair) for pair in zip(self.most, used, strict=True)]


def summary(row: dict[str, Any]) -> str:
    """One line of the table that is printed last."""
    shown = (
        "weight_gib",
        "peak_activation_gib",
        "non_torch_gib",
        "cuda_graph_gib",
        "cuda_graph_estimate_gib",
        "kv_cache_gib",
        "kv_cache_tokens",
        "device_used_after_load_gib",
        "device_used_after_64_requests_gib",
        "device_used_after_hard_load_gib",
    )
    most = max(row["device_peak_bytes"]) / GIB
    problem = f" {row['failed_stage']}: {row['root_cause']}"[:160] if "root_cause" in row else ""
    settings = ",".join(f"{key}={value}" for key, value in row["args"].items())
    values = " ".join(str(row.get(name, "-")) for name in shown)
    return f"{row['model']} {settings} | {values} | peak {most:.3f} | {row['wall_s']} s{problem}"


def _wait(process: subprocess.Popen[str], limit_s: float) -> bool:
    try:
        process.wait(max(limit_s, 0.0))
    except subprocess.TimeoutExpired:
        return False
    return True


def _arguments() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("results", type=Path, help="JSON lines, appended to")
    arguments.add_argument("--cases", choices=LISTS, default="one")
    arguments.add_argument(
        "--known", type=Path, nargs="*", default=[], help="results whose loads are not repeated"
    )
    arguments.add_argument("--count", type=int, help="the first so many cases only")
    arguments.add_argument("--limit-s", type=float, default=540.0)
    arguments.add_argument("--work", type=Path, default=Path("/tmp/ballast-memory"))
    arguments.add_argument("--logs", type=Path, help="a .tar.xz for every load's log")
    return arguments.parse_args()


if __name__ == "__main__":
    main()
