import os
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from deployments import cards
from deployments.cards import Available, Card, Holder, available, largest
from deployments.engines.vllm import device_bytes
from vram.gpu import device_named
from vram.units import GIB

HOLDER = Holder(process_id=12, name="python", held_bytes=60 * GIB)
PLAN: Any = SimpleNamespace(device=device_named("H100"), gpu_fraction=1.0)


def seen(monkeypatch: pytest.MonkeyPatch, *free_gib: float) -> list[float]:
    """What the card says, look by look; returns what was not asked for."""
    left = list(free_gib)

    async def cards_of(_: Any) -> tuple[Card, ...]:
        free = int(left.pop(0) * GIB)
        return (Card(node_id="n", index=0, free_bytes=free, holders=(HOLDER,)),)

    async def sleep(_: float) -> None: ...

    monkeypatch.setattr(cards, "cards_of", cards_of)
    monkeypatch.setattr(cards.asyncio, "sleep", sleep)
    return left


async def test_a_restart_waits_until_the_memory_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    left = seen(monkeypatch, 10, 40, 70, 99)
    found = await available(PLAN, None, expected_bytes=70 * GIB, back_s=60.0)
    assert found.free_bytes == 70 * GIB
    assert left == [99]


async def test_memory_that_does_not_come_back_has_a_holder_with_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen(monkeypatch, 10, 10, 10)
    found = await available(PLAN, None, expected_bytes=70 * GIB, back_s=-1.0)
    assert found == Available(free_bytes=10 * GIB, holders=(HOLDER,))
    assert found.held_by == "python (process 12) holds 60.0 GiB"


async def test_a_first_load_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    left = seen(monkeypatch, 10, 40)
    assert (await available(PLAN, None, back_s=60.0)).free_bytes == 10 * GIB
    assert left == [40]


def test_the_largest_holders_are_named() -> None:
    many = [Holder(process_id=n, name="p", held_bytes=n) for n in range(9)]
    assert [holder.process_id for holder in largest(many)] == [8, 7, 6]
    assert Available(free_bytes=0).held_by == "no process that can be seen from here"


@pytest.mark.parametrize("is_virtual", [False, True])
def test_memory_of_an_engine_is_counted_where_the_driver_tells_whose_it_is(
    monkeypatch: pytest.MonkeyPatch, is_virtual: bool
) -> None:
    """A virtual card's driver does not; then nothing else may suffer."""

    def running(_: Any) -> list[Any]:
        if is_virtual:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        of = ((os.getpid(), 7 * GIB), (1, GIB), (os.getpid(), None))
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in of]

    for name, fake in {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetComputeRunningProcesses": running,
    }.items():
        monkeypatch.setattr(pynvml, name, fake)
    assert device_bytes([psutil.Process()]) == (0 if is_virtual else 7 * GIB)
