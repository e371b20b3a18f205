"""Fifty deaths in a row leave nothing behind: counted."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil
from samples import KILLED
from test_keeper import Clients, Ladder, answer, generate

from deployments import processes
from deployments.engines import leftovers
from deployments.engines.fake import FakeEngine
from deployments.engines.protocol import Listener, TokenRequest
from deployments.keeper import Keeper
from deployments.oom import death_from_exit
from deployments.policy import fixed
from deployments.restarts import RestartLimit
from deployments.supervisor import Supervisor
from vram.settings import EngineSettings

DEATHS = 50
# An engine's process: takes shared memory and a semaphore, has a child, and waits to be killed.
PROCESS = """
import subprocess, sys, tempfile, time
from multiprocessing import get_context, shared_memory
from deployments.engines.leftovers import note_names
note_names()
lock = get_context("spawn").Lock()
memory = shared_memory.SharedMemory(create=True, size=64)
kept = tempfile.mkstemp()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


class ProcessEngine(FakeEngine):
    """A fake engine with real processes, reaped as vLLM's are."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None
        self.life = ""
        self.names: list[str] = []  # that killed lives took in /dev/shm

    async def start(self, settings: EngineSettings, listener: Listener) -> None:
        self.life = uuid.uuid4().hex
        with processes.marked(self.life), leftovers.kept_in(self.folder / self.life[:8]):
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROCESS], stdout=subprocess.PIPE, text=True
            )
        assert self.process.stdout is not None
        self.child = int(await asyncio.to_thread(self.process.stdout.readline))
        await super().start(settings, listener)

    async def stop(self) -> None:
        await super().stop()
        if self.process is not None:
            await processes.reap(self.life)
            self.process.communicate()
            leftovers.remove(self.folder / self.life[:8])
            self.process = None

    def kill(self) -> None:
        assert self.process is not None
        notes = (self.folder / self.life[:8] / leftovers.NAMES).read_text()
        self.names += [line.split()[1].lstrip("/") for line in notes.splitlines()]
        os.kill(self.process.pid, signal.SIGKILL)
        self.die(death_from_exit(-signal.SIGKILL, "running"))


def make_keeper(ladder: Ladder, clients: Clients, engine: FakeEngine) -> Keeper[TokenRequest]:
    limit = RestartLimit(max_restarts=DEATHS, window_s=600.0)
    supervisor = Supervisor(ladder(0)[0], fixed(ladder), limit)
    return Keeper(
        "fake", engine, supervisor, on_step=clients.on_step, on_give_up=clients.on_give_up
    )


def held() -> dict[str, int]:
    """What this process has open and below it."""
    gc.collect()
    me = psutil.Process()
    return {
        "open files": me.num_fds(),
        "threads": me.num_threads(),
        "children": len(me.children(recursive=True)),
        "tasks": len(asyncio.all_tasks()),
    }


async def die(keeper: Keeper[TokenRequest], clients: Clients, names: Sequence[str]) -> None:
    for name in names:
        await generate(keeper, name)
    await clients.until(lambda: keeper.is_serving)


async def test_fifty_deaths_leave_no_file_task_thread_or_process(ladder: Ladder) -> None:
    clients = Clients()
    engine = FakeEngine()
    keeper = make_keeper(ladder, clients, engine)
    await keeper.start()
    before = held()
    for number in range(DEATHS):
        await die(keeper, clients, [f"a{number}", f"b{number}"])
        engine.die(KILLED)
    await clients.until(lambda: len(clients.finished) == 2 * DEATHS)
    await clients.until(lambda: keeper.is_serving)
    assert clients.tokens == {name: answer(name) for name in clients.tokens}
    assert held() == before
    assert len(keeper.journal) == 0
    assert keeper._quarantine._records == {}
    await keeper.stop()


async def test_deaths_of_real_processes_leave_nothing_in_shared_memory_or_below_us(
    ladder: Ladder, tmp_path: Path
) -> None:
    clients = Clients()
    folder = Path("/tmp") / f"ballast-test-{os.getpid()}"
    engine = ProcessEngine(folder)
    keeper = make_keeper(ladder, clients, engine)
    await keeper.start()
    before = held()
    for number in range(DEATHS):
        await generate(keeper, f"a{number}")
        child = engine.child
        engine.kill()
        async with asyncio.timeout(60):
            while not keeper.is_serving:
                await asyncio.sleep(0.01)
        assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"
    await clients.until(lambda: len(clients.finished) == DEATHS)
    assert held() == before
    assert len(engine.names) == 2 * DEATHS
    left = {name.removeprefix("sem.") for name in os.listdir("/dev/shm")}
    assert not left & set(engine.names)
    life = engine.life
    await keeper.stop()
    assert processes.find(life) == []
    assert list(folder.iterdir()) == []
    folder.rmdir()
