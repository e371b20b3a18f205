from collections.abc import Callable
from dataclasses import replace

import pytest
from samples import KILLED, OUT_OF_MEMORY

from deployments.events import Died, GiveUp, Reap, Replay, Spawn, Started
from deployments.oom import Cause, Death
from deployments.policy import fixed
from deployments.restarts import RestartLimit
from deployments.supervisor import State, Supervisor
from vram.ladder import Rung

Ladder = Callable[[int], tuple[Rung, ...]]


@pytest.fixture
def supervisor(ladder: Ladder) -> Supervisor:
    limit = RestartLimit(max_restarts=2, window_s=100.0)
    return Supervisor(ladder(0)[0], fixed(ladder), limit)


def died(generation: int, death: Death, at_s: float = 0.0, longest: int = 0) -> Died:
    return Died(generation=generation, death=death, at_s=at_s, longest_request_tokens=longest)


def test_a_first_load_that_works_replays_what_already_waits(supervisor: Supervisor) -> None:
    (spawn,) = supervisor.begin(0.0)
    assert spawn == Spawn(generation=1, settings=supervisor.rung.settings)
    assert supervisor.state is State.LOADING
    assert supervisor.on_event(Started(generation=1, at_s=1.0)) == (Replay(generation=1),)
    assert supervisor.state is State.READY


def test_a_memory_death_reaps_and_goes_one_rung_down(supervisor: Supervisor) -> None:
    supervisor.begin(0.0)
    supervisor.on_event(Started(generation=1, at_s=1.0))
    reap, spawn = supervisor.on_event(died(1, OUT_OF_MEMORY))
    assert reap == Reap(generation=1)
    assert isinstance(spawn, Spawn)
    assert spawn.generation == 2
    assert spawn.settings.max_model_len == 1024
    assert supervisor.state is State.RECOVERING


def test_a_memory_death_at_the_first_load_is_still_loading(supervisor: Supervisor) -> None:
    supervisor.begin(0.0)
    supervisor.on_event(died(1, OUT_OF_MEMORY))
    assert supervisor.state is State.LOADING
    assert supervisor.rung.name == "half"


def test_a_death_that_was_not_memory_keeps_the_settings(supervisor: Supervisor) -> None:
    supervisor.begin(0.0)
    supervisor.on_event(Started(generation=1, at_s=1.0))
    _, spawn = supervisor.on_event(died(1, KILLED))
    assert isinstance(spawn, Spawn)
    assert spawn.settings.max_model_len == 2048


@pytest.mark.parametrize("cause", [Cause.OTHER, Cause.REFUSED])
def test_an_error_of_the_first_load_that_is_neither_memory_nor_a_kill_is_raised_at_once(
    supervisor: Supervisor, cause: Cause
) -> None:
    supervisor.begin(0.0)
    error = Death(cause=cause, phase="loading", message="no such file")
    _, give_up = supervisor.on_event(died(1, error))
    assert give_up == GiveUp(reason="it can't be loaded")


def test_the_ladder_ends(supervisor: Supervisor) -> None:
    supervisor.begin(0.0)
    for generation in (1, 2):
        supervisor.on_event(died(generation, OUT_OF_MEMORY))
    _, give_up = supervisor.on_event(died(3, OUT_OF_MEMORY))
    assert give_up == GiveUp(reason="no smaller settings are left")
    assert supervisor.state is State.FAILED
    assert [attempt.rung for attempt in supervisor.attempts] == ["user", "half", "quarter"]


def test_a_step_down_never_strands_a_request_in_flight(supervisor: Supervisor) -> None:
    supervisor.begin(0.0)
    supervisor.on_event(Started(generation=1, at_s=1.0))
    _, spawn = supervisor.on_event(died(1, OUT_OF_MEMORY, longest=1500))
    assert isinstance(spawn, Spawn)
    assert spawn.settings.max_model_len == 1500


def test_a_rung_that_can_not_work_is_passed_over(ladder: Ladder) -> None:
    def with_gap(longest: int) -> tuple[Rung, ...]:
        user, half, quarter = ladder(longest)
        return user, replace(half, skipped_reason="the weights alone are larger"), quarter

    limit = RestartLimit(max_restarts=2, window_s=100.0)
    supervisor = Supervisor(ladder(0)[0], fixed(with_gap), limit)
    supervisor.begin(0.0)
    supervisor.on_event(died(1, OUT_OF_MEMORY))
    assert supervisor.rung.name == "quarter"


def test_restarts_are_bounded_in_the_window_and_free_again_after_it(supervisor: Supervisor) -> None:
    supervisor.begin(0.0)
    for generation, at_s in enumerate((0.0, 1.0, 150.0, 151.0), 1):
        supervisor.on_event(Started(generation=generation, at_s=at_s))
        supervisor.on_event(died(generation, KILLED, at_s=at_s))
        assert supervisor.state is not State.FAILED
    _, give_up = supervisor.on_event(died(5, KILLED, at_s=152.0))
    assert isinstance(give_up, GiveUp)
    assert "2 restarts in 100 s" in give_up.reason


def test_many_streams_that_notice_one_death_are_one_step(supervisor: Supervisor) -> None:
    supervisor.begin(0.0)
    supervisor.on_event(Started(generation=1, at_s=1.0))
    assert supervisor.on_event(died(1, OUT_OF_MEMORY))
    assert supervisor.on_event(died(1, OUT_OF_MEMORY)) == ()
    assert supervisor.rung.name == "half"


def test_a_start_of_a_life_that_is_over_changes_nothing(supervisor: Supervisor) -> None:
    supervisor.begin(0.0)
    supervisor.on_event(died(1, KILLED))
    assert supervisor.on_event(Started(generation=1, at_s=2.0)) == ()
    assert supervisor.state is State.LOADING


def test_the_history_tells_each_attempt_and_its_end(supervisor: Supervisor) -> None:
    supervisor.begin(0.0)
    supervisor.on_event(died(1, OUT_OF_MEMORY))
    supervisor.on_event(Started(generation=2, at_s=5.0))
    first, second = supervisor.attempts
    assert "CUDA out of memory" in str(first)
    assert str(second) == "half (context 1024): serving"


def test_loads_that_fail_one_after_the_other_end_however_long_each_takes(ladder: Ladder) -> None:
    supervisor = Supervisor(
        ladder(0)[0], fixed(ladder), RestartLimit(max_restarts=2, window_s=100.0)
    )
    supervisor.begin(0.0)
    supervisor.on_event(Started(generation=1, at_s=1.0))
    for generation in (1, 2, 3):
        assert isinstance(
            supervisor.on_event(died(generation, KILLED, at_s=1000.0 * generation))[1], Spawn
        )
    _, give_up = supervisor.on_event(died(4, KILLED, at_s=4000.0))
    assert give_up == GiveUp(reason="3 loads in a row have failed")
    assert supervisor.state is State.FAILED


def test_a_death_of_one_request_steps_nowhere_and_its_conviction_goes_back(
    supervisor: Supervisor,
) -> None:
    supervisor.begin(0.0)
    for generation in (1, 2):
        supervisor.on_event(Started(generation=generation, at_s=1.0))
        supervisor.on_event(died(generation, OUT_OF_MEMORY))
    assert supervisor.rung.name == "quarter"
    supervisor.on_event(Started(generation=3, at_s=1.0))
    alone = replace(died(3, OUT_OF_MEMORY), is_of_one_request=True)
    supervisor.on_event(alone)
    assert supervisor.rung.name == "quarter"
    supervisor.on_event(Started(generation=4, at_s=1.0))
    _, spawn = supervisor.on_event(replace(alone, generation=4, pardon_from=1))
    assert isinstance(spawn, Spawn)
    assert spawn.settings.max_model_len == 2048
    supervisor.on_event(Started(generation=5, at_s=1.0))
    supervisor.on_event(died(5, OUT_OF_MEMORY))
    assert supervisor.rung.name == "half"


def test_settings_that_served_are_tried_again_where_no_smaller_are_left(
    supervisor: Supervisor,
) -> None:
    supervisor.begin(0.0)
    for generation in range(1, 6):
        supervisor.on_event(Started(generation=generation, at_s=1.0))
        _, last = supervisor.on_event(died(generation, OUT_OF_MEMORY))
    assert isinstance(last, GiveUp)
    rungs = [attempt.rung for attempt in supervisor.attempts]
    assert rungs == ["user", "half", "quarter", "quarter", "quarter"]
    assert last.reason.startswith("no smaller settings are left, and more than 2 restarts")
