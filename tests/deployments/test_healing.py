"""When a degraded replica climbs, over random facts; and where a course of steps leads."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from samples import KILLED, OUT_OF_MEMORY, SETTINGS

from deployments.course import Course
from deployments.events import Died, Quiet, Reap, Spawn, Started
from deployments.healing import SETTLE_S, Facts, Room, due_at_s, may_climb
from deployments.policy import fixed
from deployments.restarts import RestartLimit
from deployments.supervisor import State, Supervisor
from vram.ladder import Rung

QUIET_S = 100.0
TIMES = st.floats(0, 1e6)
ROOMS = st.builds(
    Room,
    needed_bytes=st.integers(1, 100),
    then_bytes=st.integers(0, 100),
    now_bytes=st.integers(0, 100),
)
FACTS = st.builds(
    Facts,
    has_larger=st.booleans(),
    larger_has_served=st.booleans(),
    quiet_since_s=TIMES,
    failed_climbs=st.integers(0, 2000),
    failed_at_s=TIMES,
    in_flight=st.integers(0, 3),
    room=st.none() | ROOMS,
    room_since_s=st.none(),
    is_other_climbing=st.booleans(),
)


@given(FACTS, TIMES)
def test_it_never_climbs_before_the_quiet_time_unless_room_has_come(
    facts: Facts, now_s: float
) -> None:
    if now_s < facts.quiet_since_s + QUIET_S:
        assert not may_climb(facts, QUIET_S, now_s)


@given(FACTS, TIMES, TIMES)
def test_it_never_climbs_before_room_that_has_come_has_stayed(
    facts: Facts, now_s: float, room_since_s: float
) -> None:
    facts = replace(facts, room_since_s=room_since_s)
    if now_s < max(room_since_s, facts.quiet_since_s) + SETTLE_S:
        assert not may_climb(facts, QUIET_S, now_s)


@given(FACTS, TIMES, st.none() | TIMES, st.integers(1, 20))
def test_after_k_failed_climbs_it_waits_for_2_to_the_k_quiet_times(
    facts: Facts, now_s: float, room_since_s: float | None, failed_climbs: int
) -> None:
    facts = replace(facts, failed_climbs=failed_climbs, room_since_s=room_since_s)
    if now_s < facts.failed_at_s + QUIET_S * 2**failed_climbs:
        assert not may_climb(facts, QUIET_S, now_s)


@given(FACTS, TIMES)
def test_it_never_climbs_beside_another_replica_nor_without_room(
    facts: Facts, now_s: float
) -> None:
    assert not may_climb(replace(facts, is_other_climbing=True), QUIET_S, now_s)
    small = Room(needed_bytes=2, then_bytes=0, now_bytes=1)
    assert not may_climb(replace(facts, room=small), QUIET_S, now_s)


@given(FACTS)
def test_what_has_served_is_tried_in_the_end_and_what_has_not_only_with_room(facts: Facts) -> None:
    facts = replace(facts, has_larger=True, room=None, is_other_climbing=False)
    due_s = due_at_s(facts, QUIET_S)
    assert (due_s is not None) == facts.larger_has_served
    if due_s is not None:
        assert may_climb(replace(facts, in_flight=0), QUIET_S, due_s)
        assert not may_climb(replace(facts, in_flight=1), QUIET_S, due_s)
        assert may_climb(replace(facts, in_flight=1), QUIET_S, due_s + QUIET_S)
    assert due_at_s(replace(facts, room_since_s=facts.quiet_since_s), QUIET_S) is not None


def test_room_has_come_only_if_it_was_not_there_before() -> None:
    assert Room(needed_bytes=50, then_bytes=40, now_bytes=60).has_come
    assert not Room(needed_bytes=50, then_bytes=55, now_bytes=60).has_come
    assert not Room(needed_bytes=50, then_bytes=40, now_bytes=49).has_come


def rung(tokens: int) -> Rung:
    settings = replace(SETTINGS, max_model_len=tokens)
    return Rung(name=str(tokens), settings=settings, price="", skipped_reason=None)


ASKED = rung(2048)
STEPS = st.lists(
    st.one_of(st.just("up"), st.tuples(st.integers(1, 2048), st.booleans())), max_size=12
)


@given(STEPS)
def test_no_course_leads_above_what_was_asked_nor_to_what_never_served(
    steps: list[str | tuple[int, bool]],
) -> None:
    course = Course(rung=ASKED, asked=ASKED)
    served = {ASKED.settings.max_model_len}
    for number, step in enumerate(steps):
        if isinstance(step, str):
            before, course = course, course.up()
            assert course.back == replace(before, back=None)
            assert course.rung.settings.max_model_len in served
        else:
            tokens, has_served = step
            if has_served:
                served.add(course.rung.settings.max_model_len)
            course = course.down(rung(tokens), has_served=has_served, at_s=float(number))
        assert all(r.settings.max_model_len in served for r in course.path)
        assert course.rung not in course.path
        assert course.is_degraded == (course.rung != ASKED) == (course.since_s is not None)


def test_a_course_goes_down_and_up_the_same_way() -> None:
    top = Course(rung=ASKED, asked=ASKED)
    half = top.down(rung(1024), has_served=True, at_s=1.0)
    quarter = half.down(rung(512), has_served=True, at_s=2.0)
    assert [r.name for r in quarter.path] == ["2048", "1024"]
    assert quarter.since_s == 1.0
    assert quarter.up().rung.name == "1024"
    assert quarter.up().settled() == half
    assert quarter.up().settled().up().settled() == top


def test_a_step_that_failed_to_load_is_not_on_the_way_back() -> None:
    top = Course(rung=ASKED, asked=ASKED)
    course = top.down(rung(1024), has_served=True, at_s=1.0)
    course = course.down(rung(512), has_served=False, at_s=2.0)
    assert [r.name for r in course.path] == ["2048"]


OUTCOMES = st.lists(
    st.sampled_from(["dies", "dies_loading", "killed", "quiet", "brief"]), max_size=30
)


@given(OUTCOMES)
def test_whatever_happens_the_engine_is_never_started_above_what_was_asked(
    outcomes: list[str],
) -> None:
    """And after a failed climb with exactly what served before it."""

    def ladder(longest: int) -> tuple[Rung, ...]:
        return tuple(rung(tokens) for tokens in (2048, 1024, 512, 256))

    limit = RestartLimit(max_restarts=1000, window_s=1.0)
    supervisor = Supervisor(ASKED, fixed(ladder), limit, heal_after_s=QUIET_S)
    supervisor.begin(0.0)
    now_s = 0.0
    for outcome in outcomes:
        if supervisor.state is State.FAILED:
            return
        number, before = supervisor.generation, supervisor.course
        if outcome == "dies_loading":
            died = Died(generation=number, death=OUT_OF_MEMORY, at_s=now_s)
            effects = supervisor.on_event(died)
        else:
            supervisor.on_event(Started(generation=number, at_s=now_s))
            now_s += QUIET_S if outcome == "quiet" else 1.0
            if outcome in ("quiet", "brief"):
                quiet = Quiet(generation=number, reason="it has been quiet", at_s=now_s)
                effects = supervisor.on_event(quiet)
            else:
                death = OUT_OF_MEMORY if outcome == "dies" else KILLED
                effects = supervisor.on_event(Died(generation=number, death=death, at_s=now_s))
        spawned = [effect for effect in effects if isinstance(effect, Spawn)]
        for spawn in spawned:
            assert effects[0] == Reap(generation=number)
            assert spawn.settings.max_model_len <= ASKED.settings.max_model_len
            assert spawn.settings == supervisor.rung.settings
        if outcome.startswith("dies") and before.back is not None and spawned:
            assert supervisor.course == before.back
            assert supervisor.failed_climbs > 0
        if outcome == "quiet" and before.is_degraded and before.larger is not None:
            assert spawned[0].settings == before.larger.settings
