"""Engines of an earlier run of the server, which nobody owns any more: found by mark, and ended.

An engine may outlive its server, when that was killed with all that would have ended it. It keeps
its memory, and the next server finds a full card. Ended is only what carries our mark and whose
owner is gone: never the engine of a second server, never what is not ours.
"""

import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import structlog

from deployments import processes
from deployments.engines import leftovers
from vram.units import gib

FOLDER = "ballast-engine-"  # of a life's files: "ballast-engine-PID-START-…"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """A process of an engine whose replica is gone."""

    process_id: int
    name: str
    age_s: float
    resident_bytes: int
    owner: str


def is_orphan(owner: str, living: Iterable[str]) -> bool:
    """`owner` and `living` as `processes.identity` has them; without a mark it is nobody's."""
    return bool(owner) and owner not in living


def find() -> list[psutil.Process]:
    """Processes of this node with our mark whose owner no longer lives."""
    marked = [
        (process, owner)
        for process in psutil.process_iter()
        if (owner := processes.marks_of(process.pid).get(processes.OWNER))
    ]
    living = {processes.identity(_process_id(owner)) for _, owner in marked}
    return [
        process
        for process, owner in marked
        if is_orphan(owner, living) and process.pid != os.getpid()
    ]


async def reap() -> tuple[Orphan, ...]:
    """End every orphan on this node and remove what it left; returns what was ended."""
    found = find()
    orphans = tuple(orphan for process in found if (orphan := _describe(process)) is not None)
    segments = processes.shared_memory_segments(found)
    for orphan in orphans:
        log.warning(
            "orphan_reaped", pid=orphan.process_id, name=orphan.name,
            age_s=round(orphan.age_s), memory=gib(orphan.resident_bytes), owner=orphan.owner,
        )  # fmt: skip
    try:
        await processes.kill_all(find, "of a server that is gone")
    except TimeoutError as error:  # what it still holds, the check before the load will see
        log.error("orphan_survives", error=str(error))
    for segment in segments:
        segment.unlink(missing_ok=True)
    for folder in abandoned_folders(Path(tempfile.gettempdir())):
        leftovers.remove(folder, is_ours=False)
    return orphans


def folder_prefix() -> str:
    """For the temporary folder of a life's files: it says whose it is."""
    return f"{FOLDER}{processes.identity(os.getpid())}-"


def abandoned_folders(below: Path) -> tuple[Path, ...]:
    """Folders of lives whose owner is gone."""
    return tuple(
        folder
        for folder in below.glob(f"{FOLDER}*")
        if is_orphan(owner := _owner_of(folder.name), {processes.identity(_process_id(owner))})
    )


def _describe(process: psutil.Process) -> Orphan | None:
    try:
        return Orphan(
            process_id=process.pid,
            name=process.name(),
            age_s=time.time() - process.create_time(),
            resident_bytes=process.memory_info().rss,
            owner=processes.marks_of(process.pid).get(processes.OWNER, ""),
        )
    except psutil.NoSuchProcess:
        return None


def _owner_of(folder_name: str) -> str:
    process_id, _, rest = folder_name.removeprefix(FOLDER).partition("-")
    return f"{process_id}-{rest.partition('-')[0]}"


def _process_id(owner: str) -> int:
    digits = owner.partition("-")[0]
    return int(digits) if digits.isdecimal() else 0
