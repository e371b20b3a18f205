"""The processes of one server: all that it starts, what memory they hold, and their end.

Ray's workers, an EngineCore or an HAProxy leave the group and outlive the parent of a server that
dies. The benchmark adopts such orphans (a Linux subreaper), so its own descendants are always all
of them, and nobody else's process is ever touched.
"""

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO

import psutil

ENGINE_TITLE = "VLLM::EngineCore"
MARK = "BENCHMARKED_SERVER"  # which one a process belongs to
PR_SET_CHILD_SUBREAPER = 36
ORPHAN_GRACE_S = 5.0  # an EngineCore ends by itself a moment after its parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of the process that holds the HTTP connections, and of all that the server started."""

    api_process: str
    api_rss_bytes: int
    api_pss_bytes: int
    total_pss_bytes: int
    num_processes: int


def adopt_orphans() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) was refused")


def end_on_sigterm() -> None:
    """As on Ctrl-C, so that the server under way is ended too."""

    def interrupt(signal_number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def start(
    command: list[str], *, cwd: str, env: dict[str, str], log: IO[bytes]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def descendants() -> list[psutil.Process]:
    """Ours, without the dead that wait for their parent."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if _is_alive(process)]


def stop_all(leader: subprocess.Popen[bytes], *, grace_s: float) -> int:
    """Ask the leader, then whatever is left, then insist; return how many did not go when asked."""
    leader.send_signal(signal.SIGINT)
    try:
        leader.wait(grace_s)
    except subprocess.TimeoutExpired:
        leader.kill()
    _, leftovers = psutil.wait_procs(descendants(), timeout=ORPHAN_GRACE_S)
    for kind, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 10.0)):
        remaining = descendants()
        send(remaining, kind)
        psutil.wait_procs(remaining, timeout=patience_s)
    reap_adopted()
    return len(leftovers)


def marked(mark: str) -> list[psutil.Process]:
    """Those of our descendants that belong to one server.

    Their children too: vLLM writes its titles over the environment that tells.
    """
    ours = descendants()
    found = {process.pid for process in ours if _mark_of(process) == mark}
    while more := {p.pid for p in ours if p.pid not in found and _parent_id(p) in found}:
        found |= more
    return [process for process in ours if process.pid in found]


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except psutil.NoSuchProcess:  # also a zombie
        return None


def _parent_id(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


def measure(mark: str) -> Memory | None:
    """Of one server; None where no EngineCore tells which process has the HTTP connections.

    EngineCore's parent is vLLM's API server, Ray Serve LLM's replica or Ballast's replica.
    """
    processes = marked(mark)
    api = _api_process(processes)
    if api is None:
        return None
    own = api.memory_full_info()
    return Memory(
        api_process=" ".join(api.cmdline())[:100],
        api_rss_bytes=own.rss,
        api_pss_bytes=own.pss,
        total_pss_bytes=sum(_pss_bytes(process) for process in processes),
        num_processes=len(processes),
    )


def api_process() -> psutil.Process:
    """The process with the HTTP connections. Raises `LookupError` while no engine runs."""
    api = _api_process(descendants())
    if api is None:
        raise LookupError("no EngineCore runs")
    return api


def busy_share() -> float:
    """Of all cores, over one second."""
    return float(psutil.cpu_percent(interval=1.0)) / 100


def listener(port: int) -> str | None:
    """Who listens on the port, in words."""
    for connection in psutil.net_connections("tcp"):
        listens_there = getattr(connection.laddr, "port", None) == port
        if connection.status == psutil.CONN_LISTEN and listens_there:
            if connection.pid is None:
                return "a process of someone else"
            return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return None


def _api_process(processes: Iterable[psutil.Process]) -> psutil.Process | None:
    return next((_parent(process) for process in processes if _is_engine(process)), None)


def _parent(process: psutil.Process) -> psutil.Process | None:
    try:
        return process.parent()
    except psutil.NoSuchProcess:
        return None


def _is_engine(process: psutil.Process) -> bool:
    try:
        return bool(" ".join(process.cmdline()).startswith(ENGINE_TITLE))
    except psutil.NoSuchProcess:
        return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _pss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0


def send(processes: Iterable[psutil.Process], kind: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(kind)
        except psutil.NoSuchProcess:
            continue


def reap_adopted() -> None:
    """Bury adopted orphans; nobody else waits for them."""
    for process in psutil.Process().children():
        try:
            os.waitpid(process.pid, os.WNOHANG)
        except ChildProcessError:
            continue
