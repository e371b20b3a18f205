import pytest

from deployments.journal import Journal


def test_a_request_is_replayed_from_the_tokens_that_its_client_has() -> None:
    journal: Journal[str] = Journal()
    journal.admit("a", "request", total_tokens=100)
    journal.record("a", [1, 2], finished=False)
    journal.record("a", [3], finished=False)
    entry = journal.hand_over(1)
    assert entry is not None
    assert entry.emitted == [1, 2, 3]


def test_a_finished_request_is_not_replayed() -> None:
    journal: Journal[str] = Journal()
    journal.admit("a", "request", total_tokens=100)
    assert journal.record("a", [1], finished=True)
    assert "a" not in journal
    assert not journal.record("a", [2], finished=False)


def test_a_request_is_handed_to_each_life_once_and_latecomers_are_found() -> None:
    journal: Journal[str] = Journal()
    journal.admit("a", "request", total_tokens=1)
    first = journal.hand_over(2)
    journal.admit("b", "request", total_tokens=1)
    second = journal.hand_over(2)
    assert first is not None
    assert second is not None
    assert (first.request_id, second.request_id) == ("a", "b")
    assert journal.hand_over(2) is None
    assert (first.replays, second.replays) == (0, 0)
    again = journal.hand_over(3)
    assert again is first
    assert first.replays == 1


def test_the_longest_request_bounds_the_context() -> None:
    journal: Journal[str] = Journal()
    assert journal.longest_request_tokens == 0
    journal.admit("a", "request", total_tokens=300)
    journal.admit("b", "request", total_tokens=500)
    assert journal.longest_request_tokens == 500
    journal.release("b")
    assert journal.longest_request_tokens == 300


def test_one_id_is_one_request() -> None:
    journal: Journal[str] = Journal()
    journal.admit("a", "request", total_tokens=1)
    with pytest.raises(ValueError, match="already in flight"):
        journal.admit("a", "request", total_tokens=1)


def test_giving_up_returns_who_has_to_be_told() -> None:
    journal: Journal[str] = Journal()
    journal.admit("a", "request", total_tokens=1)
    assert [entry.request_id for entry in journal.clear()] == ["a"]
    assert len(journal) == 0
