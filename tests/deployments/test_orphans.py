"""Real processes: owners that live and owners that are gone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deployments import orphans, processes
from deployments.orphans import is_orphan

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def started(env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A sleeping process that can be read: for a moment of its start it has no environment."""
    process = subprocess.Popen(SLEEP, env=env)
    deadline_s = time.monotonic() + 10
    while not Path(f"/proc/{process.pid}/environ").read_bytes():
        assert time.monotonic() < deadline_s
    return process


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a sleeping process with these marks."""
    running: list[subprocess.Popen[bytes]] = []

    def start(**marks: str) -> subprocess.Popen[bytes]:
        process = started({**os.environ, **marks})
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def dead_owner() -> str:
    """The identity of a process that has ended."""
    owner = started()
    identity = processes.identity(owner.pid)
    owner.kill()
    owner.wait()
    return identity


def test_who_has_no_mark_is_no_orphan() -> None:
    assert not is_orphan("", ())


def test_a_number_that_is_another_process_by_now_is_no_owner() -> None:
    assert is_orphan("12-100", {"12-101", "13-100"})
    assert not is_orphan("12-100", {"12-100"})


def test_a_process_that_has_ended_but_was_not_waited_for_has_no_identity() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert processes.identity(child.pid) == ""
    child.wait()


def test_an_engine_that_is_started_names_its_owner() -> None:
    with processes.marked("a-life"):
        child = started()
    try:
        assert processes.marks_of(child.pid) == {
            processes.MARK: "a-life",
            processes.OWNER: processes.identity(os.getpid()),
        }
        assert child.pid not in {process.pid for process in orphans.find()}
    finally:
        child.kill()
        child.wait()
    assert processes.MARK not in os.environ
    assert processes.OWNER not in os.environ


async def test_what_a_dead_server_left_is_ended_and_nothing_else(
    start: Start, dead_owner: str
) -> None:
    orphan = start(BALLAST_LIFE="x", BALLAST_OWNER=dead_owner)
    stopped = start(BALLAST_LIFE="x", BALLAST_OWNER=dead_owner)
    os.kill(stopped.pid, signal.SIGSTOP)
    of_another_server = start(BALLAST_LIFE="y", BALLAST_OWNER=processes.identity(os.getpid()))
    not_ours = start()
    reaped = await orphans.reap()
    assert {o.process_id for o in reaped} == {orphan.pid, stopped.pid}
    assert all(o.owner == dead_owner and o.resident_bytes > 0 for o in reaped)
    assert orphan.wait(5) == stopped.wait(5) == -signal.SIGKILL
    assert psutil.pid_exists(of_another_server.pid)
    assert psutil.pid_exists(not_ours.pid)
    assert of_another_server.poll() is None
    assert not_ours.poll() is None


def test_folders_of_lives_are_abandoned_when_their_owner_is_gone(
    tmp_path: Path, dead_owner: str
) -> None:
    gone = tmp_path / f"{orphans.FOLDER}{dead_owner}-abc"
    ours = tmp_path / f"{orphans.folder_prefix()}abc"
    other = tmp_path / "something-else"
    for folder in (gone, ours, other):
        folder.mkdir()
    assert orphans.abandoned_folders(tmp_path) == (gone,)


async def test_an_orphan_that_does_not_end_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, start: Start, dead_owner: str
) -> None:
    """A process in the driver's hands may outlive SIGKILL; what it holds the next check says."""
    start(BALLAST_LIFE="x", BALLAST_OWNER=dead_owner)

    async def kill_all(*_: object) -> tuple[int, ...]:
        raise TimeoutError("processes 7 of a server that is gone did not end in 30 s")

    monkeypatch.setattr(processes, "kill_all", kill_all)
    assert len(await orphans.reap()) == 1
