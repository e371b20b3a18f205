"""What a killed engine leaves behind besides memory: files, sockets, semaphores, shared memory.

Each life has a folder, which is its temporary one. Names in /dev/shm can't be put there: the life's
processes note them in the folder, because the tracker of multiprocessing, which all lives share,
would remove them only when the replica ends.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sized
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path

from deployments import environment

NAMES = "names-in-dev-shm"
_NAMES_VARIABLE = "BALLAST_NAMES"
_SHARED_MEMORY = Path("/dev/shm")
# A Unix socket's path has 107 characters, and vLLM's sockets have a UUID for a name.
_LONGEST_FOLDER = 107 - 1 - 36


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Processes that start inside put their temporary files, sockets and notes into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = {_NAMES_VARIABLE: str(folder / NAMES)}
    if len(str(folder)) <= _LONGEST_FOLDER:
        variables["TMPDIR"] = variables["VLLM_RPC_BASE_PATH"] = str(folder)
        # Compiled kernels outlive the engine that made them.
        compiled = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
        variables["TORCHINDUCTOR_CACHE_DIR"] = os.environ.get("TORCHINDUCTOR_CACHE_DIR", compiled)
    with environment.changed(variables):
        yield


def note_names() -> None:
    """Inside the engine's processes: write down each name in /dev/shm that is taken from now on."""
    notes = os.environ.get(_NAMES_VARIABLE)
    if notes is None:
        return
    register = resource_tracker.register

    def noted(name: Sized, rtype: str) -> None:
        register(name, rtype)
        with open(notes, "a", encoding="utf-8") as file:
            file.write(f"{rtype} {name}\n")

    resource_tracker.register = noted


def remove(folder: Path, *, is_ours: bool = True, shared_memory: Path = _SHARED_MEMORY) -> None:
    """After the end of a life: its folder, and what it noted.

    `is_ours`: it was started here, so that its names are known to this process's tracker.
    """
    for rtype, name in _noted(folder / NAMES):
        prefix = "sem." if rtype == "semaphore" else ""
        file = shared_memory / f"{prefix}{name.lstrip('/')}"
        if file.parent == shared_memory and file.exists():
            with suppress(OSError):  # not a file of ours after all
                file.unlink(missing_ok=True)
            if is_ours:  # else the tracker would look for it when the replica ends
                resource_tracker.unregister(name, rtype)
    shutil.rmtree(folder, ignore_errors=True)


def _noted(notes: Path) -> list[tuple[str, str]]:
    """Only whole lines: their process may have been killed while it wrote."""
    try:
        text = notes.read_text(encoding="utf-8", errors="replace")
    except OSError:  # there are none, or they are of another user of this machine
        return []
    pairs = (line.partition(" ") for line in text.splitlines(keepends=True) if line[-1] == "\n")
    return [
        (rtype, name.rstrip("\n"))
        for rtype, _, name in pairs
        if rtype in ("semaphore", "shared_memory")
    ]
