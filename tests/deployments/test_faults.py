"""When a fault is due. Pure: no engine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deployments.faults import Fault, InBatch, Rehearsal, carry_out, death_of, message_of
from deployments.oom import Cause, classify
from deployments.phases import LOADING, Phase
from vram.shortage import ShortageKind
from vram.units import MIB

NEW = InBatch(prompt="hello", is_replayed=False)
REPLAYED = InBatch(prompt="hello", is_replayed=True)
POISON = InBatch(prompt="take this poison now", is_replayed=False)


@given(
    life=st.integers(1, 6),
    after_tokens=st.integers(0, 60),
    batches=st.lists(st.integers(0, 8), min_size=20, max_size=60),
)
def test_a_fault_is_due_once_in_its_life_at_the_first_step_after_its_tokens(
    life: int, after_tokens: int, batches: list[int]
) -> None:
    fault = Fault(life=life, after_tokens=after_tokens)
    for this_life in range(1, 7):
        rehearsal, num_tokens, due_at = Rehearsal([fault], this_life), 0, []
        is_reached = False
        for size in batches:
            is_reached = is_reached or (size > 0 and num_tokens >= after_tokens)
            if rehearsal.stepping([NEW] * size) is not None:
                due_at.append(num_tokens)
                assert size > 0
            rehearsal.generated(size)
            num_tokens += size
        if this_life != life or not is_reached:
            assert due_at == []
        else:
            (tokens,) = due_at
            assert after_tokens <= tokens < after_tokens + max(batches)


@given(st.sampled_from(LOADING), st.integers(1, 4))
def test_a_fault_of_a_load_is_due_once_where_its_phase_begins(phase: Phase, life: int) -> None:
    fault = Fault(life=life, phase=phase)
    for this_life in range(1, 5):
        rehearsal = Rehearsal([fault], this_life)
        due = [entered for entered in LOADING if rehearsal.entered(entered) is fault]
        assert due == ([phase] if this_life == life else [])
        assert rehearsal.entered(phase) is None
        assert rehearsal.stepping([NEW]) is None


def test_a_fault_without_a_life_is_due_in_every_one() -> None:
    for life in (1, 2, 7):
        rehearsal = Rehearsal([Fault(phase=Phase.PROFILING)], life)
        assert rehearsal.entered(Phase.PROFILING) is not None


def test_two_equal_faults_are_two_deaths() -> None:
    rehearsal = Rehearsal([Fault(), Fault()], 1)
    assert [rehearsal.stepping([NEW]) is not None for _ in range(3)] == [True, True, False]


def test_poison_is_due_when_its_request_is_in_the_batch() -> None:
    rehearsal = Rehearsal([Fault(prompt_contains="poison")], 3)
    assert rehearsal.reads_prompts
    assert rehearsal.stepping([NEW, REPLAYED]) is None
    assert rehearsal.stepping([NEW, POISON]) is not None
    assert not rehearsal.reads_prompts


def test_a_fault_at_a_replay_waits_for_a_replayed_request() -> None:
    rehearsal = Rehearsal([Fault(life=2, at_replay=True)], 2)
    assert rehearsal.stepping([NEW]) is None
    assert rehearsal.stepping([NEW, REPLAYED]) is not None


def test_all_that_a_fault_names_has_to_come_together() -> None:
    rehearsal = Rehearsal([Fault(prompt_contains="poison", after_tokens=5)], 1)
    assert rehearsal.stepping([POISON]) is None
    rehearsal.generated(5)
    assert rehearsal.stepping([NEW]) is None
    assert rehearsal.stepping([POISON]) is not None


@pytest.mark.parametrize(
    ("phase", "kind"),
    [
        (Phase.LOAD_MODEL, ShortageKind.WEIGHTS),
        (Phase.PROFILING, ShortageKind.ACTIVATIONS),
        (Phase.KV_PLANNING, ShortageKind.NO_CACHE_BLOCKS),
        (Phase.KV_ALLOCATION, ShortageKind.CACHE_ALLOCATION),
        (Phase.GRAPH_CAPTURE, ShortageKind.GRAPH_CAPTURE),
        (Phase.WARM_UP, ShortageKind.WARM_UP),
        (Phase.EXECUTE_MODEL, ShortageKind.RUN_TIME),
    ],
)
def test_memory_is_short_where_the_phase_wants_it(phase: Phase, kind: ShortageKind) -> None:
    death = death_of(Fault(phase=phase))
    assert death is not None
    assert death.shortage is not None
    assert death.shortage.kind is kind
    missing = None if phase is Phase.KV_PLANNING else 16 * MIB
    assert death.shortage.missing_bytes == missing


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("cause", [Cause.DEVICE_MEMORY, Cause.HOST_MEMORY, Cause.OTHER])
def test_a_message_is_read_as_the_cause_that_it_stands_for(phase: Phase, cause: Cause) -> None:
    fault = Fault(phase=phase, cause=cause)
    assert classify(message_of(fault)) is cause
    death = death_of(fault, ["a"])
    assert death is not None
    told = "running" if phase is Phase.EXECUTE_MODEL else "loading"
    assert (death.cause, death.phase, death.requests) == (cause, told, ("a",))


def test_a_killed_an_ended_and_a_stopped_one_say_different_things() -> None:
    killed, ended = death_of(Fault(cause=Cause.KILLED)), death_of(Fault(by="exit"))
    assert killed is not None
    assert ended is not None
    assert (killed.cause, ended.cause) == (Cause.KILLED, Cause.OTHER)
    assert death_of(Fault(by="sigstop")) is None


def test_an_exception_is_of_the_class_that_says_it_in_earnest() -> None:
    with pytest.raises(ValueError, match="cache blocks"):
        carry_out(Fault(phase=Phase.KV_PLANNING))
    with pytest.raises(MemoryError, match="Cannot allocate memory"):
        carry_out(Fault(cause=Cause.HOST_MEMORY))
    with pytest.raises(RuntimeError, match="a bug"):
        carry_out(Fault(cause=Cause.OTHER, message="a bug"))
    torch = pytest.importorskip("torch")
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 20\.00 MiB"):
        carry_out(Fault(phase=Phase.LOAD_MODEL))
    carry_out(None)


@pytest.mark.parametrize(
    "words",
    [
        {"phase": "load_model", "at_replay": True},
        {"phase": "profiling", "prompt_contains": "x"},
        {"by": "exception", "cause": "killed"},
        {"by": "exit", "cause": "device_memory"},
        {"by": "sigkill", "message": "x"},
        {"cause": "refused"},
        {"life": 0},
        {"prompt_contains": ""},
    ],
)
def test_a_fault_with_words_that_would_have_no_effect_is_refused(words: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Fault.model_validate(words)


def test_a_fault_survives_the_way_into_another_process() -> None:
    for fault in (Fault(), Fault(life=2, by="exit"), Fault(cause=Cause.KILLED, at_replay=True)):
        assert Fault.model_validate_json(fault.model_dump_json(exclude_unset=True)) == fault
