from dataclasses import replace

import pytest

from deployments.oom import Cause
from deployments.quarantine import is_evidence
from deployments.watchdog import Facts, Patience, Watchdog, Watched

WORKER = (7, "VLLM::Worker")
BUSY = Watched(generation=1, heard_at_s=0.0, num_running=3)
IDLE = replace(BUSY, num_running=0)
LOADING = Watched(generation=1, heard_at_s=0.0, is_loading=True)


@pytest.fixture
def watchdog() -> Watchdog:
    return Watchdog(Patience(stopped_s=5.0, stall_s=60.0, load_s=600.0), tick_s=1.0)


def first_verdict(
    watchdog: Watchdog, life: Watched, from_s: int, to_s: int, *stopped: tuple[int, str]
) -> int | None:
    """When it first says so, looking once a second."""
    for at_s in range(from_s, to_s):
        if watchdog.look(Facts(at_s=at_s, life=life, stopped=frozenset(stopped))):
            return at_s
    return None


@pytest.mark.parametrize("life", [BUSY, IDLE, LOADING])
def test_a_stopped_process_is_found_within_its_time_busy_idle_or_loading(
    watchdog: Watchdog, life: Watched
) -> None:
    assert first_verdict(watchdog, life, 0, 3) is None
    assert first_verdict(watchdog, life, 3, 60, WORKER) == 8
    death = watchdog.look(Facts(at_s=9.0, life=life, stopped=frozenset({WORKER})))
    assert death is not None
    assert death.cause is Cause.STALLED
    assert death.phase == ("loading" if life.is_loading else "running")
    assert "VLLM::Worker (process 7)" in death.message
    assert "recovery.stopped_s" in death.message
    assert not is_evidence(death)  # a signal from outside is no request's fault


def test_a_process_that_goes_on_in_time_is_left_alone(watchdog: Watchdog) -> None:
    for from_s in range(0, 40, 4):
        assert first_verdict(watchdog, IDLE, from_s, from_s + 3, WORKER) is None
        assert first_verdict(watchdog, IDLE, from_s + 3, from_s + 4) is None


def test_an_engine_that_takes_no_step_while_it_has_requests_is_found(watchdog: Watchdog) -> None:
    assert first_verdict(watchdog, BUSY, 0, 100) == 60
    death = watchdog.look(Facts(at_s=61.0, life=BUSY))
    assert death is not None
    assert "3 requests" in death.message
    assert is_evidence(death)


def test_an_engine_that_steps_is_alive_however_long(watchdog: Watchdog) -> None:
    for at_s in range(0, 1000):
        heard = replace(BUSY, heard_at_s=at_s - 50.0)
        assert watchdog.look(Facts(at_s=at_s, life=heard)) is None


def test_an_engine_without_requests_may_be_silent_and_has_its_full_time_after_that(
    watchdog: Watchdog,
) -> None:
    assert first_verdict(watchdog, IDLE, 0, 5000) is None
    assert first_verdict(watchdog, BUSY, 5000, 6000) == 5059


def test_a_load_has_a_time_of_its_own(watchdog: Watchdog) -> None:
    assert first_verdict(watchdog, LOADING, 0, 1000) == 600


def test_the_time_of_one_life_is_not_counted_against_the_next(watchdog: Watchdog) -> None:
    assert first_verdict(watchdog, BUSY, 0, 59) is None
    assert first_verdict(watchdog, replace(BUSY, generation=2), 59, 200) == 119


def test_a_load_is_not_counted_against_the_first_request(watchdog: Watchdog) -> None:
    assert first_verdict(watchdog, LOADING, 0, 500) is None
    assert first_verdict(watchdog, BUSY, 500, 700) == 560


def test_while_the_replica_itself_stood_still_nothing_was_seen(watchdog: Watchdog) -> None:
    assert first_verdict(watchdog, BUSY, 0, 30, WORKER) == 5
    watchdog.look(Facts(at_s=30.0, life=BUSY, stopped=frozenset()))
    assert first_verdict(watchdog, BUSY, 500, 600, WORKER) == 505
    assert first_verdict(watchdog, BUSY, 1000, 1100) == 1060
