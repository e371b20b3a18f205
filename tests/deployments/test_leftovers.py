"""A life's own processes note what they take; whoever ends them removes it."""

import os
import subprocess
import sys
from pathlib import Path

from deployments.engines import leftovers

# As a killed engine does: it takes a semaphore and shared memory, and does not end by itself.
TAKES = """
import os, tempfile
from multiprocessing import get_context, shared_memory
from deployments.engines.leftovers import note_names
note_names()
lock = get_context("spawn").Lock()
memory = shared_memory.SharedMemory(create=True, size=64)
tempfile.mkstemp()
os.kill(os.getpid(), 9)
"""


def test_names_that_a_killed_process_took_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "life"
    before = set(os.listdir("/dev/shm"))
    with leftovers.kept_in(folder):
        # A tracker of its own would clean up; the one of a replica outlives its engines.
        child = "from multiprocessing import resource_tracker as t\nt.ensure_running = lambda: None"
        child += "\nt._resource_tracker._send = lambda *_: None\n"
        subprocess.run([sys.executable, "-c", child + TAKES], check=False)
    notes = (folder / leftovers.NAMES).read_text().splitlines()
    names = {line.split()[1].lstrip("/") for line in notes}
    left = set(os.listdir("/dev/shm")) - before
    assert {name.removeprefix("sem.") for name in left} >= names
    assert len(names) == 2
    leftovers.remove(folder, is_ours=False)
    left = set(os.listdir("/dev/shm")) - before
    assert not {name.removeprefix("sem.") for name in left} & names
    assert not folder.exists()


def test_temporary_files_of_a_life_are_in_its_folder_and_the_environment_comes_back(
    tmp_path: Path,
) -> None:
    before = dict(os.environ)
    folder = Path("/tmp") / f"ballast-test-{os.getpid()}"
    with leftovers.kept_in(folder):
        made = subprocess.check_output(
            [sys.executable, "-c", "import tempfile; print(tempfile.mkstemp()[1])"], text=True
        )
    assert Path(made.strip()).parent == folder
    assert dict(os.environ) == before
    leftovers.remove(folder)
    assert not folder.exists()


def test_a_folder_whose_path_is_too_long_for_a_socket_is_not_given_to_sockets(
    tmp_path: Path,
) -> None:
    with leftovers.kept_in(tmp_path / ("x" * 80)):
        assert os.environ.get("VLLM_RPC_BASE_PATH", "") != str(tmp_path / ("x" * 80))


def test_a_note_that_was_cut_off_or_leads_elsewhere_removes_nothing(tmp_path: Path) -> None:
    folder, shared_memory = tmp_path / "life", tmp_path / "shm"
    folder.mkdir()
    (shared_memory / "deep").mkdir(parents=True)
    (shared_memory / "deep" / "a").touch()
    (shared_memory / "psm_1").touch()
    (folder / leftovers.NAMES).write_text("shared_memory /deep/a\nother x\nshared_memory /psm_1")
    leftovers.remove(folder, is_ours=False, shared_memory=shared_memory)
    assert (shared_memory / "psm_1").exists()
    assert (shared_memory / "deep" / "a").exists()


def test_without_a_folder_nothing_is_noted() -> None:
    from multiprocessing import resource_tracker

    register = resource_tracker.register
    leftovers.note_names()
    assert resource_tracker.register is register


def test_notes_that_cannot_be_read_do_not_end_the_reaper(tmp_path: Path) -> None:
    no_folder = tmp_path / "ballast-engine-1-1-x"
    no_folder.write_text("somebody's file")
    leftovers.remove(no_folder, is_ours=False)  # a NotADirectoryError; of another user: EACCES
    in_the_way = tmp_path / "shm" / "psm_1"
    in_the_way.mkdir(parents=True)
    folder = tmp_path / "life"
    folder.mkdir()
    (folder / leftovers.NAMES).write_text("shared_memory psm_1\n")
    leftovers.remove(folder, is_ours=False, shared_memory=tmp_path / "shm")
    assert not folder.exists()
