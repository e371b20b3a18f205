"""The rows are faults that a config takes, in lives that follow from each other."""

import pytest

from benchmarks.fault_rows import GROUPS, PHASES, ROWS, Row, faults_of, first_lives, groups
from deployments.faults import Fault
from deployments.oom import Cause

LADDER_STEPS = 3  # of the policy `fixed`, in a replica's life


@pytest.mark.parametrize("rows", GROUPS, ids=lambda rows: rows[0].name)
def test_the_faults_of_a_server_are_ones_that_a_config_takes(rows: tuple[Row, ...]) -> None:
    faults = [Fault.model_validate(fault) for fault in faults_of(rows, "a mark")]
    lives = [fault.life for fault in faults]
    assert len(set(lives)) == len(lives)
    assert all(life is not None and life < first_lives(rows)[-1] + rows[-1].lives for life in lives)
    memory = [f for f in faults if f.way == "exception" and f.cause is Cause.DEVICE_MEMORY]
    assert len(memory) <= LADDER_STEPS


def test_each_life_of_a_row_ends_by_its_blow_or_by_a_fault() -> None:
    for row in ROWS.values():
        if row.blow is None or row.lives:  # a killed replica counts anew
            assert row.lives == len(row.faults) + (row.blow is not None), row.name


def test_a_row_keeps_its_place_after_those_that_run_before_it() -> None:
    (rows,) = groups(["core", "replay"])
    assert [row.name for row in rows] == ["core", "replay"]
    assert first_lives(rows) == [1, 2]
    assert [fault["life"] for fault in faults_of(rows, "x")] == [3]


def test_no_row_meets_a_marked_fault_that_is_meant_for_the_row_after_it() -> None:
    for rows in GROUPS:
        marked = [fault["life"] for fault in faults_of(rows, "x") if "prompt_contains" in fault]
        ends = {first + row.lives for first, row in zip(first_lives(rows), rows, strict=True)}
        assert not ends & set(marked), rows[0].name
    (rows,) = groups(["three"])
    assert faults_of(rows, "x")[0]["prompt_contains"] == "x"


def test_memory_runs_out_in_each_phase_in_the_first_load_and_in_a_later_one() -> None:
    for phase in PHASES:
        start, restart = ROWS[f"start-{phase}"], ROWS[f"restart-{phase}"]
        assert start.at_start
        assert start.dies_before_load
        assert restart.blow is not None
    assert ROWS["start-execute_model"].at_start
    assert not ROWS["start-execute_model"].dies_before_load


def test_a_row_whose_settings_are_missing_says_so() -> None:
    row = Row(name="x", title="x", recovery={"of_tomorrow": 1, "wait_s": 3})
    assert row.missing_settings == ["of_tomorrow"]
