"""Gloo groups of one share a listener; larger ones keep their own."""

import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

SPAWN = multiprocessing.get_context("spawn")
NUM_GROUPS = 5
WAIT_S = 120.0


def member(rank: int, size: int, meeting_point: Path, found: Any) -> None:
    """In a process of its own: what is installed stays installed."""
    import torch
    from torch import distributed

    from deployments.engines import vllm_groups

    vllm_groups.install()
    store = distributed.FileStore(str(meeting_point), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    groups = [distributed.new_group(backend="gloo") for _ in range(NUM_GROUPS)]
    sums = []
    for group in groups:
        tensor = torch.tensor([rank + 1.0])
        distributed.all_reduce(tensor, group=group)
        sums.append(tensor.item())
    names = (Path(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task"))
    listeners = sum(name.read_text().strip() == "gloo_tcp_loop" for name in names)
    found.put((sums, listeners))
    distributed.destroy_process_group()


def _run(size: int, folder: Path) -> Sequence[tuple[list[float], int]]:
    found = SPAWN.Queue()
    members = [
        SPAWN.Process(target=member, args=(rank, size, folder / "store", found))
        for rank in range(size)
    ]
    for process in members:
        process.start()
    answers = [found.get(timeout=WAIT_S) for _ in members]
    for process in members:
        process.join(WAIT_S)
        assert process.exitcode == 0
    return answers


def test_groups_of_one_share_a_listener(tmp_path: Path) -> None:
    [(sums, listeners)] = _run(1, tmp_path)
    assert sums == [1.0] * NUM_GROUPS
    assert listeners == 1


def test_groups_of_two_have_listeners_of_their_own(tmp_path: Path) -> None:
    for sums, listeners in _run(2, tmp_path):
        assert sums == [3.0] * NUM_GROUPS
        assert listeners == 1 + NUM_GROUPS
