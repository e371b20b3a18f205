import pickle

from vram.shortage import Shortage, ShortageKind


def test_missing_is_what_was_asked_beyond_what_was_free() -> None:
    shortage = Shortage(kind=ShortageKind.RUN_TIME, asked_bytes=500, free_bytes=200)
    assert shortage.missing_bytes == 300


def test_nothing_is_missing_where_more_was_free_than_asked() -> None:
    shortage = Shortage(kind=ShortageKind.RUN_TIME, asked_bytes=200, free_bytes=500)
    assert shortage.missing_bytes == 0


def test_missing_is_unknown_without_both_numbers() -> None:
    assert Shortage(kind=ShortageKind.WEIGHTS, asked_bytes=1).missing_bytes is None
    assert Shortage(kind=ShortageKind.WEIGHTS, free_bytes=1).missing_bytes is None


def test_reserved_memory_that_would_have_been_enough_is_fragmentation() -> None:
    short = Shortage(kind=ShortageKind.RUN_TIME, asked_bytes=100, reserved_bytes=99)
    fragmented = Shortage(kind=ShortageKind.RUN_TIME, asked_bytes=100, reserved_bytes=100)
    assert not short.is_fragmented
    assert fragmented.is_fragmented


def test_it_crosses_processes() -> None:
    shortage = Shortage(kind=ShortageKind.CONTEXT_TOO_LONG, max_model_len=4096)
    assert pickle.loads(pickle.dumps(shortage)) == shortage
