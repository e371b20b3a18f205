"""The engine is stopped under load, which nothing tells but a look at its processes."""

import os
import signal

import pytest
from load import stream_all
from server import Server
from test_survival import PAUSE_BESIDE_START_S, assert_unharmed, undisturbed

from deployments.config import RecoveryConfig

pytestmark = [pytest.mark.serve, pytest.mark.timeout(400)]

STOPPED_S = RecoveryConfig().stopped_s
LOOKS_S = 3.0  # it looks once a second, on two busy cores
# Ray asks a stopped actor to end, and waits for it, before it is killed.
KILL_GRACE_S = {"demo": 0.0, "demo-hf": 10.0}


@pytest.mark.parametrize(("model", "process"), [("demo", "Worker"), ("demo-hf", "")])
async def test_a_stopped_engine_is_found_and_replaced_and_no_stream_ends(
    server: Server, model: str, process: str
) -> None:
    expected = await undisturbed(server, model)
    victim = server.engine_process(model, process)
    answers = await stream_all(
        server.url,
        model,
        requests=100,
        at_once=16,
        max_tokens=64,
        after_s=1.0,
        disturb=lambda: os.kill(victim, signal.SIGSTOP),
    )
    assert_unharmed(answers, expected)
    status = server.status(model)
    assert status["state"] == "ready"
    assert status["events"][-2]["cause"] == "stalled"
    assert str(victim) in status["events"][-2]["message"]
    start_s = status["events"][-1]["started_at"] - status["events"][-1]["spawned_at"]
    bound_s = start_s + PAUSE_BESIDE_START_S + STOPPED_S + LOOKS_S + KILL_GRACE_S[model]
    assert max(answer.longest_pause_s for answer in answers) <= bound_s
