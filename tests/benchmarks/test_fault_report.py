"""From answers to a row: what is counted as harm, and what is printed of it."""

import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from benchmarks.fault_load import Told
from benchmarks.fault_report import Outcome, counted, flat, published, sentence, table
from benchmarks.fault_rows import ROWS, Row

EXPECTED = {0: [1, 2, 3], 1: [4, 5, 6]}
WHOLE = [Told(number=0, token_ids=[1, 2, 3]), Told(number=1, token_ids=[4, 5, 6])]
NEIGHBOUR = Row(name="ray-core", title="a neighbour")


def test_whole_answers_are_no_harm() -> None:
    outcome = counted(ROWS["core"], WHOLE, EXPECTED)
    assert outcome.is_unharmed
    assert (outcome.ok, outcome.failed) == (2, 0)


@pytest.mark.parametrize(
    ("second", "failed", "lost", "repeated"),
    [
        (Told(number=1, token_ids=[4, 5]), 0, 1, 0),
        (Told(number=1, token_ids=[4, 5, 5, 6]), 0, 0, 1),
        (Told(number=1, token_ids=[4, 7, 6]), 0, 1, 1),
        (Told(number=1, token_ids=[4], failure="500"), 1, 2, 0),
        (Told(number=1, failure="503"), 1, 3, 0),
    ],
)
def test_harm_is_counted_in_requests_and_in_tokens(
    second: Told, failed: int, lost: int, repeated: int
) -> None:
    outcome = counted(ROWS["core"], [WHOLE[0], second], EXPECTED)
    assert (outcome.failed, outcome.lost_tokens, outcome.repeated_tokens) == (
        failed, lost, repeated,
    )  # fmt: skip
    assert not outcome.is_unharmed


def test_a_row_that_did_not_run_is_not_unharmed() -> None:
    assert not Outcome(name="core", title="x", note="the server did not start").is_unharmed


def test_what_a_client_waits_beyond_the_engine_s_own_loads() -> None:
    outcome = replace(
        counted(ROWS["core"], WHOLE, EXPECTED),
        longest_pause_s=14.0, recovery_s=15.0, own_start_s=13.5,
    )  # fmt: skip
    assert outcome.beyond_start_s == 0.5
    assert replace(outcome, name="start-load_model").beyond_start_s == 1.5  # nobody waits yet
    assert replace(outcome, own_start_s=None).beyond_start_s is None


def test_a_server_that_never_recovers_is_told_in_the_table_and_in_json() -> None:
    outcome = replace(counted(NEIGHBOUR, WHOLE, EXPECTED), recovery_s=math.inf)
    console = Console(width=170, record=True)
    console.print(table([outcome]))
    (line,) = [line for line in console.export_text().splitlines() if "a neighbour" in line]
    assert "never" in line
    told = json.loads(json.dumps([flat(outcome), *published()], allow_nan=False))
    assert told[0]["recovery_s"] is None
    assert told[0]["recovers"] is False


def test_a_sentence_says_the_numbers_or_why_there_are_none() -> None:
    assert "2 ok, 0 failed, 0 lost" in sentence(counted(ROWS["core"], WHOLE, EXPECTED))
    assert sentence(Outcome(name="x", title="x", note="skipped")) == "x: skipped"
