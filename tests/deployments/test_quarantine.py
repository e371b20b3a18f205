from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import KILLED, OUT_OF_MEMORY

from deployments.oom import Cause, Death
from deployments.quarantine import (
    PROBATION_TOKENS,
    STRIKES,
    SUSPECT_DEATHS,
    Blame,
    Quarantine,
    is_evidence,
)

SEGFAULT = Death(cause=Cause.KILLED, phase="running", message="ended by signal 11")


ALL = ("a", "b", "c", "d")


def emitted(*names: str, tokens: int = 0) -> dict[str, int]:
    return dict.fromkeys(names, tokens)


def test_one_death_makes_nobody_a_suspect() -> None:
    quarantine = Quarantine()
    assert quarantine.blame(1, OUT_OF_MEMORY, emitted("a", "b"), in_flight=ALL) == Blame()
    assert quarantine.suspects(("a", "b")) == ()


def test_who_was_in_two_deaths_of_a_kind_is_tried() -> None:
    quarantine = Quarantine()
    quarantine.blame(1, OUT_OF_MEMORY, emitted("a", "b"), in_flight=ALL)
    quarantine.blame(2, OUT_OF_MEMORY, emitted("a", "c", tokens=5), in_flight=ALL)
    assert quarantine.suspects(("c", "a")) == ("a",)
    assert quarantine.pass_at_tokens("a") == 5 + PROBATION_TOKENS


def test_two_deaths_of_different_kinds_make_nobody_a_suspect() -> None:
    quarantine = Quarantine()
    quarantine.blame(1, OUT_OF_MEMORY, emitted("a", "b"), in_flight=ALL)
    quarantine.blame(2, SEGFAULT, emitted("a", "b"), in_flight=ALL)
    assert quarantine.suspects(("a", "b")) == ()


def test_the_batch_that_the_engine_named_is_believed() -> None:
    quarantine = Quarantine()
    death = replace(OUT_OF_MEMORY, requests=("b", "gone"))
    for generation in (1, 2):
        quarantine.blame(generation, death, emitted("a", "b", "c"), in_flight=ALL)
    assert quarantine.suspects(("a", "b", "c")) == ("b",)


def test_two_deaths_on_trial_convict_and_name_the_life_before_the_suspicion() -> None:
    quarantine = Quarantine()
    quarantine.blame(3, SEGFAULT, emitted("a", "b"), in_flight=ALL)
    quarantine.blame(4, SEGFAULT, emitted("a", "b"), in_flight=ALL)
    quarantine.on_trial = "a"
    assert quarantine.blame(5, SEGFAULT, emitted("a"), in_flight=ALL) == Blame(is_strike=True)
    assert quarantine.suspects(("a", "b")) == ("b", "a")  # the likeliest comes last
    quarantine.on_trial = "a"
    blame = quarantine.blame(6, SEGFAULT, emitted("a"), in_flight=ALL)
    assert blame == Blame(is_strike=True, convicted="a", deaths=4, first_generation=3)
    assert quarantine.suspects(("b",)) == ("b",)


def test_who_was_alone_in_two_memory_deaths_needs_no_trial() -> None:
    quarantine = Quarantine()
    assert quarantine.blame(1, OUT_OF_MEMORY, emitted("a"), in_flight=ALL) == Blame()
    blame = quarantine.blame(2, OUT_OF_MEMORY, emitted("a"), in_flight=ALL)
    assert blame == Blame(is_strike=True, convicted="a", deaths=2, first_generation=1)


def test_who_was_alone_in_two_crashes_is_tried_first() -> None:
    quarantine = Quarantine()
    for generation in (1, 2):
        assert quarantine.blame(generation, SEGFAULT, emitted("a"), in_flight=ALL) == Blame()
    assert quarantine.suspects(("a",)) == ("a",)


def test_a_suspect_that_survives_its_trial_is_cleared() -> None:
    quarantine = Quarantine()
    for generation in (1, 2):
        quarantine.blame(generation, OUT_OF_MEMORY, emitted("a", "b"), in_flight=ALL)
    quarantine.on_trial = "a"
    quarantine.clear("a")
    assert quarantine.on_trial is None
    assert quarantine.suspects(("a", "b")) == ("b",)
    assert quarantine.blame(3, OUT_OF_MEMORY, emitted("a", "c"), in_flight=ALL) == Blame()


def test_a_death_of_others_on_its_trial_is_no_strike() -> None:
    quarantine = Quarantine()
    for generation in (1, 2):
        quarantine.blame(generation, OUT_OF_MEMORY, emitted("a", "b"), in_flight=ALL)
    quarantine.on_trial = "a"
    named = replace(OUT_OF_MEMORY, requests=("c", "d"))
    assert quarantine.blame(3, named, emitted("a", "c", "d"), in_flight=ALL) == Blame()


def test_a_request_that_ended_leaves_no_record() -> None:
    quarantine = Quarantine()
    quarantine.blame(1, OUT_OF_MEMORY, emitted("a", "b"), in_flight=ALL)
    quarantine.blame(2, OUT_OF_MEMORY, emitted("c", "d"), in_flight=("c", "d"))
    quarantine.blame(3, OUT_OF_MEMORY, emitted("a", "b"), in_flight=ALL)
    assert quarantine.suspects(("a", "b")) == ()


@pytest.mark.parametrize(
    ("death", "counts"),
    [
        (KILLED, False),  # SIGKILL: however often somebody does that
        (replace(KILLED, message="ended by signal 15"), False),
        (SEGFAULT, True),
        (OUT_OF_MEMORY, True),
        (replace(OUT_OF_MEMORY, cause=Cause.OTHER, message="illegal memory access"), True),
    ],
)
def test_a_signal_from_outside_is_nobodys_fault(death: Death, counts: bool) -> None:
    assert is_evidence(death) is counts
    quarantine = Quarantine()
    for generation in range(1, 6):
        assert (
            quarantine.blame(generation, death, emitted("a", "b"), in_flight=ALL).convicted is None
        )
    assert bool(quarantine.suspects(("a", "b"))) is counts


@given(
    num_innocent=st.integers(0, 12),
    num_poisons=st.integers(0, 4),
    death=st.sampled_from([OUT_OF_MEMORY, SEGFAULT]),
    names_batch=st.booleans(),
    data=st.data(),
)
def test_all_poisons_and_nobody_else_are_convicted_after_a_bounded_number_of_deaths(
    num_innocent: int, num_poisons: int, death: Death, names_batch: bool, data: st.DataObject
) -> None:
    poisons = {f"poison-{number}" for number in range(num_poisons)}
    everybody = [*poisons, *(f"innocent-{number}" for number in range(num_innocent))]
    in_flight = data.draw(st.permutations(sorted(everybody)))
    room = data.draw(st.integers(1, len(in_flight) + 1))  # of a batch; the others queue
    quarantine, generation, convicted = Quarantine(), 0, set()
    deaths_with = dict.fromkeys(poisons, 0)

    def dies(batch: list[str], had: list[str]) -> None:
        nonlocal generation
        generation += 1
        for name in poisons & set(batch):
            deaths_with[name] += 1
        named = replace(death, requests=tuple(batch)) if names_batch else death
        blame = quarantine.blame(generation, named, emitted(*had), in_flight=in_flight)
        if blame.convicted is not None:
            in_flight.remove(blame.convicted)
            convicted.add(blame.convicted)

    def lives() -> bool:
        """One life of an engine that takes `room` requests at once; False: it died."""
        suspects = quarantine.suspects(in_flight)
        given = [name for name in in_flight if name not in suspects]
        running = list(given)
        while running:
            batch = running[:room]
            if poisons & set(batch):
                dies(batch, running)
                return False
            running = running[room:]
            for name in batch:
                in_flight.remove(name)
        for name in suspects:
            quarantine.on_trial = name
            if name in poisons:
                dies([name], [name])
                return False
            quarantine.clear(name)
        return True

    for _ in range((SUSPECT_DEATHS + STRIKES) * num_poisons):
        if lives():
            break
    assert lives()
    assert convicted == poisons
    assert all(STRIKES <= deaths <= SUSPECT_DEATHS + STRIKES for deaths in deaths_with.values())
