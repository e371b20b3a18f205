"""vLLM's own queues between processes, with Ballast's way to wait."""

import multiprocessing
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

pytest.importorskip("vllm")

SPAWN = multiprocessing.get_context("spawn")
# Within the spinning, just beyond it, and long after it.
PAUSES_S = (0.0, 0.0, 0.002, 0.0, 0.05, 1.5, 0.0, 0.002)
NUM_READERS = 2
WAIT_S = 60.0


def _queues() -> Any:
    """In a process of its own: what is installed stays installed."""
    from vllm.distributed.device_communicators import shm_broadcast

    from deployments.engines import vllm_wake

    # vLLM looks again every few seconds: a notification that is lost shall not be found that way.
    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = 10**9
    vllm_wake.install()
    return shm_broadcast.MessageQueue


def write(handles: Any, readers_are_dead: Any) -> None:
    queue = _queues()(NUM_READERS, NUM_READERS)
    for _ in range(NUM_READERS):
        handles.put(queue.export_handle())
    queue.wait_until_ready()
    for number, pause_s in enumerate(PAUSES_S):
        time.sleep(pause_s)
        queue.enqueue(number)
    readers_are_dead.wait(WAIT_S)
    queue.enqueue("nobody reads this")
    handles.put("told nobody")


def read(rank: int, handles: Any, heard: Any) -> None:
    queue = _queues().create_from_handle(handles.get(), rank)
    queue.wait_until_ready()
    for _ in PAUSES_S:
        heard.put((rank, queue.dequeue(indefinite=True)))
    threading.Timer(1.0, queue.shutdown).start()
    began_s = time.process_time()
    try:
        queue.dequeue(indefinite=True)
    except RuntimeError as error:
        heard.put((rank, str(error)))
    heard.put((rank, time.process_time() - began_s < 0.5))


@pytest.fixture
def processes() -> Iterator[list[BaseProcess]]:
    started: list[BaseProcess] = []
    yield started
    for process in started:
        process.kill()
        process.join()


def test_every_reader_hears_each_message_sleeps_between_and_can_be_cancelled(
    processes: list[BaseProcess],
) -> None:
    handles, heard, readers_are_dead = SPAWN.Queue(), SPAWN.Queue(), SPAWN.Event()
    processes.append(SPAWN.Process(target=write, args=(handles, readers_are_dead)))
    processes += [
        SPAWN.Process(target=read, args=(rank, handles, heard)) for rank in range(NUM_READERS)
    ]
    for process in processes:
        process.start()
    each = [*range(len(PAUSES_S)), "cancelled", True]
    got: dict[int, list[object]] = {rank: [] for rank in range(NUM_READERS)}
    for _ in range(NUM_READERS * len(each)):
        rank, message = heard.get(timeout=WAIT_S)
        got[rank].append(message)
    assert got == {rank: each for rank in range(NUM_READERS)}
    for reader in processes[1:]:
        reader.join(WAIT_S)
    readers_are_dead.set()
    assert handles.get(timeout=WAIT_S) == "told nobody"
