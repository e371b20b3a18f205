"""The policy `diagnose` in a supervisor, and its steps on their way to an engine."""

import os
from dataclasses import replace

import pytest
from samples import SETTINGS

from deployments import allocator
from deployments.app import make_plan
from deployments.config import DeviceConfig, ModelConfig
from deployments.engines.vllm_front import planned_args
from deployments.events import Died, GiveUp, Spawn, Started
from deployments.oom import Cause, Death
from deployments.recovery import supervisor_of
from deployments.supervisor import State, Supervisor
from vram.shortage import Shortage, ShortageKind
from vram.units import MIB

CONFIG = ModelConfig(
    name="demo", model="-", engine="fake", device=DeviceConfig(kind="cpu", memory_gib=4)
)


@pytest.fixture
def supervisor() -> Supervisor:
    """As a replica makes it of a config that says nothing of recovery."""
    found = supervisor_of(CONFIG, make_plan(CONFIG)[0])
    found.begin(0.0)
    return found


def dies(supervisor: Supervisor, kind: ShortageKind | None, cause: Cause = Cause.DEVICE_MEMORY):
    shortage = kind and Shortage(kind=kind, asked_bytes=20 * MIB, free_bytes=4 * MIB)
    death = Death(cause=cause, phase="loading", message="no fp8 here", shortage=shortage)
    event = Died(generation=supervisor.generation, death=death, at_s=0.0)
    return supervisor.on_event(event)[-1]


@pytest.mark.parametrize("kind", [None, *ShortageKind])
def test_three_deaths_in_a_row_are_survived_whatever_was_short(
    supervisor: Supervisor, kind: ShortageKind | None
) -> None:
    for _ in range(3):
        assert isinstance(dies(supervisor, kind), Spawn)
    supervisor.on_event(Started(generation=supervisor.generation, at_s=1.0))
    assert supervisor.state is State.READY
    assert all(attempt.reason for attempt in supervisor.attempts[1:])


def test_deaths_without_end_end(supervisor: Supervisor) -> None:
    for _ in range(100):
        effect = dies(supervisor, ShortageKind.RUN_TIME)
        if isinstance(effect, GiveUp):
            break
    assert supervisor.state is State.FAILED
    assert "needs" in supervisor.reason


def test_a_refused_step_is_followed_by_another(supervisor: Supervisor) -> None:
    step = dies(supervisor, ShortageKind.ACTIVATIONS)
    other = dies(supervisor, None, Cause.REFUSED)
    assert isinstance(step, Spawn)
    assert isinstance(other, Spawn)
    assert other.settings.max_num_batched_tokens != step.settings.max_num_batched_tokens
    assert "undone: no fp8 here" in supervisor.attempts[-1].reason


def test_a_model_that_is_refused_before_any_step_is_not_tried_again(
    supervisor: Supervisor,
) -> None:
    assert dies(supervisor, None, Cause.REFUSED) == GiveUp(reason="it can't be loaded")


def test_a_restart_that_was_not_for_memory_is_no_step(supervisor: Supervisor) -> None:
    dies(supervisor, ShortageKind.RUN_TIME)
    dies(supervisor, None, Cause.KILLED)
    assert [bool(attempt.reason) for attempt in supervisor.attempts] == [False, True, False]
    assert supervisor.attempts[1].settings == supervisor.attempts[2].settings


def test_the_ladder_of_the_users_is_there_by_name() -> None:
    config = CONFIG.model_copy(
        update={"recovery": CONFIG.recovery.model_copy(update={"policy": "fixed"})}
    )
    supervisor = supervisor_of(config, make_plan(config)[0])
    supervisor.begin(0.0)
    dies(supervisor, ShortageKind.RUN_TIME)
    assert supervisor.rung.name == "utilisation 0.70"


def test_smaller_captures_reach_vllm_and_are_not_named_otherwise() -> None:
    assert "max_cudagraph_capture_size" not in planned_args(SETTINGS)
    args = planned_args(replace(SETTINGS, max_cudagraph_capture_size=64))
    assert args["max_cudagraph_capture_size"] == 64
    assert args["cudagraph_capture_sizes"] is None
    assert "expandable_segments" not in args


def test_the_allocator_of_the_next_life_is_told_by_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:False")
    wanted = "max_split_size_mb:64,expandable_segments:True"

    with allocator.environment(replace(SETTINGS, expandable_segments=True)):
        assert os.environ["PYTORCH_ALLOC_CONF"] == wanted
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == wanted
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"].endswith("expandable_segments:False")
    with allocator.environment(SETTINGS):
        assert "PYTORCH_ALLOC_CONF" not in os.environ
