"""Kills the engine of a real server again and again, and counts what each death leaves behind.

    python -m benchmarks.leaks                # 50 deaths, about 20 minutes
    python -m benchmarks.leaks --deaths 5

Counted once the second engine serves, and after the last death. Ends with 1 if anything grew.
"""

import os
import re
import signal
import stat
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import processes
from benchmarks.one_model import one_model, status
from benchmarks.servers import (
    REPOSITORY,
    RunningServer,
    ServerKind,
    Settings,
    running,
)
from cluster.demo_model import build_demo_model

RECOVERY_TIMEOUT_S = 240.0
THREADS = "threads of the replica"
POOL_THREADS = 8  # asyncio's pool has cores + 4
_DASHBOARD = re.compile(r"dashboard at .*?(http://[\w.:]+)")
console = Console(width=None if sys.stdout.isatty() else 120)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    deaths: Annotated[int, typer.Option(min=2, help="Of EngineCore, by SIGKILL.")] = 50,
    port: Annotated[int, typer.Option(help="Of the server; the next three are used too.")] = 8100,
    model_folder: Annotated[Path, typer.Option(help="Made where missing.")] = REPOSITORY
    / ".models"
    / "demo",
) -> None:
    """One server, many deaths, one table."""
    build_demo_model(model_folder)
    settings = Settings(model_folder=model_folder.resolve(), port=port, omp_threads=1)
    processes.adopt_orphans()
    processes.end_on_sigterm()
    with running(_kind(deaths), settings) as server:
        # The first death makes what is made once: the tracker of multiprocessing, pools of threads.
        _die(server)
        before = count()
        for number in range(1, deaths):
            _die(server)
            console.print(f"death {number + 1} of {deaths}")
        after = count()
    console.print(table(before, after, deaths))
    raise typer.Exit(1 if grown(before, after) else 0)


def count() -> dict[str, int]:
    """Of all that the server started, and of the places where an engine leaves things."""
    processes.reap_adopted()  # orphans come to us, and would stay zombies for our sake only
    everybody = psutil.Process().children(recursive=True)
    replica = processes.api_process()
    temporary = _folders_of(everybody)
    return {
        "processes": len(processes.descendants()),
        "zombies": len(everybody) - len(processes.descendants()),
        "open files of the replica": replica.num_fds(),
        THREADS: replica.num_threads(),
        "names in /dev/shm": len(os.listdir("/dev/shm")),
        "sockets in temporary folders": sum(map(_num_sockets, temporary)),
        "files of engines there": sum(map(_num_engine_files, temporary)),
        "placement groups": _num_placement_groups(temporary),
    }


def grown(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """What there is more of than after the first death; pools of threads take a while to fill."""
    slack = {THREADS: POOL_THREADS}
    return [name for name, number in after.items() if number > before[name] + slack.get(name, 0)]


def table(before: Mapping[str, int], after: Mapping[str, int], deaths: int) -> Table:
    shown = Table(title=f"After 1 death and after {deaths}")
    for title in ("", "after 1", f"after {deaths}", ""):
        shown.add_column(title, justify="left" if not title else "right")
    for name, number in before.items():
        more = after[name] - number
        shown.add_row(name, str(number), str(after[name]), f"{more:+}" if more else "")
    return shown


def _kind(deaths: int) -> ServerKind:
    # Ray's dashboard listens on loopback only; without this it wants a token to list its groups.
    env = {"RAY_AUTH_MODE": "disabled"}
    return one_model({"recovery": {"max_restarts": deaths + 1}}, env)


def _die(server: RunningServer) -> None:
    """Kill EngineCore, and wait until the next one has answered a request."""
    attempt = status(server)["attempt"]
    victim = next(
        process
        for process in processes.descendants()
        if " ".join(process.cmdline()).startswith(processes.ENGINE_TITLE)
    )
    victim.send_signal(signal.SIGKILL)
    deadline_s = time.monotonic() + RECOVERY_TIMEOUT_S
    while (told := status(server))["attempt"] == attempt or told["state"] != "ready":
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no engine after {RECOVERY_TIMEOUT_S:.0f} s: {told['reason']}")
        time.sleep(0.5)
    body = {"model": "demo", "prompt": "Hello", "max_tokens": 4}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()


def _folders_of(everybody: list[psutil.Process]) -> set[Path]:
    """TMPDIR of the server's processes, engines' own folders apart: they are inside."""
    folders = set()
    for process in everybody:
        try:
            folder = process.environ().get("RAY_TMPDIR")
        except psutil.Error:
            continue
        if folder:
            folders.add(Path(folder))
    return folders


def _num_sockets(folder: Path) -> int:
    """On its first level and in the folders of engines: Ray's own are further below."""
    files = [*folder.iterdir(), *folder.glob("ballast-engine-*/*/*")]
    return sum(_is_socket(file) for file in files)


def _num_engine_files(folder: Path) -> int:
    patterns = ("ballast-engine-*/*", "vllm_dist_*", "pymp-*", "torchelastic_*")
    return sum(len([*folder.glob(pattern)]) for pattern in patterns)


def _is_socket(file: Path) -> bool:
    try:
        return stat.S_ISSOCK(file.stat().st_mode)
    except OSError:
        return False


def _num_placement_groups(folders: set[Path]) -> int:
    """As Ray's dashboard lists them, without those that are removed."""
    for log in (folder / "server.log" for folder in folders):
        found = _DASHBOARD.search(log.read_text(errors="replace")) if log.exists() else None
        if found is not None:
            url = f"{found[1]}/api/v0/placement_groups"
            groups = httpx.get(url, timeout=30).raise_for_status().json()["data"]["result"]
            return sum(group["state"] != "REMOVED" for group in groups["result"])
    raise RuntimeError("the server's log does not say where Ray's dashboard is")


if __name__ == "__main__":
    app()
