"""The processes of an engine, found by a mark that they inherit, and ended for certain.

An engine whose parent died keeps its memory for ever (129 GiB of an H200, twelve failed loads), and
is no longer anybody's child. So each life carries a mark in its environment, which every process
that it starts inherits, and the reaper looks for the mark. A second mark names the process that
the life belongs to: `orphans` looks whether that one still lives.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

import psutil

MARK = "BALLAST_LIFE"
OWNER = "BALLAST_OWNER"


@contextmanager
def marked(life: str) -> Iterator[None]:
    """Processes that start inside carry the mark of this life."""
    # multiprocessing's tracker is shared by all lives: start it before there is a mark to inherit.
    resource_tracker.ensure_running()
    os.environ[MARK] = life
    os.environ[OWNER] = identity(os.getpid())
    try:
        yield
    finally:
        del os.environ[MARK], os.environ[OWNER]


def identity(process_id: int) -> str:
    """A process as one can find it again: its number alone may be another's by then.

    "PID-START", the start in clock ticks since boot. Empty for a process that has ended.
    """
    _, fields = _stat(process_id)
    if not fields or fields[0] in "ZX":
        return ""
    return f"{process_id}-{fields[19]}"  # 22nd of proc(5)


def state_of(process_id: int) -> tuple[str, str]:
    """The letter of its state ("T": stopped by a signal; empty: gone), and its name."""
    name, fields = _stat(process_id)
    return (fields[0] if fields else ""), name


def marks_of(process_id: int) -> dict[str, str]:
    """Both marks that a process was started with; empty if it has none, ended or is not ours."""
    try:
        variables = Path(f"/proc/{process_id}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = (variable.decode(errors="replace").partition("=") for variable in variables)
    return {name: value for name, _, value in pairs if name in (MARK, OWNER)}


@contextmanager
def told(variables: Mapping[str, str]) -> Iterator[None]:
    """Processes that start inside find these in their environment."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def find(life: str) -> list[psutil.Process]:
    """Living processes with this mark, also those whose parent is gone."""
    return [
        process
        for process in psutil.process_iter()
        if marks_of(process.pid).get(MARK) == life and process.pid != os.getpid()
    ]


async def reap(life: str, *, timeout_s: float = 30.0) -> tuple[int, ...]:
    """Kill every process of this life and wait until they are gone; returns the killed ids."""
    return await kill_all(lambda: find(life), f"of {life}", timeout_s=timeout_s)


async def kill_all(
    look: Callable[[], list[psutil.Process]], whose: str, *, timeout_s: float = 30.0
) -> tuple[int, ...]:
    """Kill what `look` finds until it finds nothing more; returns the killed ids."""
    killed: set[int] = set()
    deadline_s = time.monotonic() + timeout_s
    while True:
        living = [p for p in look() if not _is_zombie(p)]
        if not living:
            return tuple(sorted(killed))
        if time.monotonic() > deadline_s:
            stuck = ", ".join(str(p.pid) for p in living)
            raise TimeoutError(f"processes {stuck} {whose} did not end in {timeout_s:.0f} s")
        for process in living:
            try:
                process.send_signal(signal.SIGKILL)  # a stopped process ends of it, too
                killed.add(process.pid)
            except psutil.NoSuchProcess:
                continue
        await asyncio.sleep(0.02)


def find_owned(owner: str) -> tuple[int, ...]:
    """Ids of the living processes of all lives of this owner."""
    return tuple(
        process_id
        for process_id in psutil.pids()
        if process_id != os.getpid() and marks_of(process_id).get(OWNER) == owner
    )


def resident_bytes(processes: list[psutil.Process]) -> int:
    """Memory that these processes alone hold, and their fair part of what they share (PSS)."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def shared_memory_segments(processes: list[psutil.Process]) -> frozenset[Path]:
    """Files in /dev/shm that they have mapped: a killed process does not unlink its own."""
    segments = set()
    for process in processes:
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except OSError:
            continue
        for line in maps.splitlines():
            _, found, name = line.partition("/dev/shm/")
            if found and not name.endswith("(deleted)"):
                segments.add(Path("/dev/shm") / name)
    return frozenset(segments)


def _stat(process_id: int) -> tuple[str, list[str]]:
    """Its name and the fields after it, from the 3rd of proc(5) on; none if it is gone."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text(errors="replace")
    except OSError:
        return "", []
    before, _, after = stat.rpartition(")")  # the name may hold anything
    return before.partition("(")[2], after.split()


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
