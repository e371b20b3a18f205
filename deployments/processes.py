"""The processes of an engine, found by a mark that they inherit, and ended for certain.

An engine whose parent died keeps its memory for ever (129 GiB of an H200, twelve failed loads), and
is no longer anybody's child. So each life carries a mark in its environment, which every process
that it starts inherits, and the reaper looks for the mark.
"""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

import psutil

MARK = "BALLAST_LIFE"


@contextmanager
def marked(life: str) -> Iterator[None]:
    """Processes that start inside carry the mark of this life."""
    # multiprocessing's tracker is shared by all lives: start it before there is a mark to inherit.
    resource_tracker.ensure_running()
    os.environ[MARK] = life
    try:
        yield
    finally:
        del os.environ[MARK]


def find(life: str) -> list[psutil.Process]:
    """Living processes with this mark, also those whose parent is gone."""
    wanted = f"{MARK}={life}".encode()
    found = []
    for process in psutil.process_iter():
        try:
            marks = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile, or is not ours to read
        if wanted in marks and process.pid != os.getpid():
            found.append(process)
    return found


async def reap(life: str, *, timeout_s: float = 30.0) -> tuple[int, ...]:
    """Kill every process of this life and wait until they are gone; returns the killed ids."""
    killed: set[int] = set()
    deadline_s = time.monotonic() + timeout_s
    while True:
        living = [p for p in find(life) if not _is_zombie(p)]
        if not living:
            return tuple(sorted(killed))
        if time.monotonic() > deadline_s:
            stuck = ", ".join(str(p.pid) for p in living)
            raise TimeoutError(f"processes {stuck} of {life} did not end in {timeout_s:.0f} s")
        for process in living:
            try:
                process.send_signal(signal.SIGKILL)
                killed.add(process.pid)
            except psutil.NoSuchProcess:
                continue
        await asyncio.sleep(0.02)


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


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
