"""The load of one row with the blow in its midst: what the clients saw, and when it was over."""

import asyncio
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import psutil

from benchmarks import fault_load, processes
from benchmarks.fault_load import Told, Traffic
from benchmarks.fault_rows import ENGINE_CORE, REPLICA, Blow
from benchmarks.servers import ServerFailedError

RECOVERY_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """What each request was told; times in seconds."""

    answers: Sequence[Told]
    recovery_s: float | None  # as the clients see it; None: no blow fell, inf: it stays down


def strike(traffic: Traffic, blow: Blow | None) -> Struck:
    """Without a blow it is the load alone."""
    victim = None if blow is None else _victim(blow)
    struck_at_s, answers = asyncio.run(_scenario(traffic, blow, victim))
    if struck_at_s is None:
        return Struck(answers=answers, recovery_s=None)
    again_at_s = _first_success(answers, struck_at_s) or _probe(traffic)
    return Struck(answers=answers, recovery_s=again_at_s - struck_at_s)


async def _scenario(
    traffic: Traffic, blow: Blow | None, victim: psutil.Process | None
) -> tuple[float | None, list[Told]]:
    """The blow falls when a quarter of the tokens of the early clients are there."""
    struck_at_s = None
    let_in = asyncio.Event()
    missing = traffic.clients * traffic.requests_per_client * traffic.output_tokens // 4

    def on_token() -> None:
        nonlocal struck_at_s, missing
        missing -= 1
        if missing == 0 and blow is not None and victim is not None:
            struck_at_s = time.time()
            victim.send_signal(signal.Signals[blow.signal_name])
            let_in.set()

    answers = await fault_load.run(traffic, on_token, let_in)
    return struck_at_s, answers


def _victim(blow: Blow) -> psutil.Process:
    name = ENGINE_CORE if blow.process == REPLICA else blow.process
    for process in processes.descendants():
        try:
            if " ".join(process.cmdline()).startswith(name):
                parent = process.parent()
                return parent if blow.process == REPLICA and parent is not None else process
        except psutil.NoSuchProcess:
            continue
    raise ServerFailedError(f"the server has no process {name}")


def _first_success(answers: Sequence[Told], struck_at_s: float) -> float | None:
    """When the first answer ended that was asked for after the blow."""
    ends = [t.ended_at_s for t in answers if t.sent_at_s > struck_at_s and t.failure is None]
    return min(ends, default=None)


def _probe(traffic: Traffic) -> float:
    """When a server answers again that failed all the rest of its load; infinite: it does not."""
    body = {"model": traffic.model, "prompt": "Hello", "max_tokens": 1}
    deadline_s = time.monotonic() + RECOVERY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            answer = httpx.post(f"{traffic.base_url}/completions", json=body, timeout=20)
            if answer.status_code == httpx.codes.OK:
                return time.time()
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    return math.inf
