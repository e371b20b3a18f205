"""Tokens to text: partial characters and stop strings, over any split."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engines.protocol import Sampling, TokenDelta, TokenLogprob, TokenRequest
from deployments.openai.choice import Choice
from deployments.openai.detokenizer import MAX_HELD_TOKENS, Detokenizer
from deployments.openai.stops import StopScanner
from deployments.openai.tokenizers import ByteTokenizer

TEXTS = st.text(
    st.sampled_from("aäß é😀👩‍👩‍👧你好\n\ufffdक्षि") | st.characters(exclude_categories=["Cs"])
)


class Pieces:
    """A tokenizer whose tokens are the given byte strings, as of byte-level BPE."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(self._pieces[token] for token in token_ids).decode(errors="replace")


class FallbackPieces(Pieces):
    """As SentencePiece with byte fallback: a run of byte tokens is text as a whole or not."""

    def decode(self, token_ids: Sequence[int]) -> str:
        text, run = "", b""
        for piece in (*(self._pieces[token] for token in token_ids), None):
            if piece is not None and len(piece) == 1 and piece[0] > 127:
                run += piece
                continue
            try:
                text += run.decode()
            except UnicodeDecodeError:
                text += "\ufffd" * len(run)
            run = b""
            text += piece.decode() if piece is not None else ""
        return text


@st.composite
def split_bytes(draw: st.DrawFn, data: bytes, most: int = 6) -> list[bytes]:
    pieces, at = [], 0
    while at < len(data):
        length = draw(st.integers(1, most))
        pieces.append(data[at : at + length])
        at += length
    return pieces


@settings(deadline=None)
@given(st.data())
def test_text_is_whole_however_its_bytes_lie_in_tokens_and_steps(data: st.DataObject) -> None:
    text = data.draw(TEXTS)
    pieces = data.draw(split_bytes(text.encode()))
    detokenizer = Detokenizer(Pieces(pieces).decode)
    said, at = "", 0
    while at < len(pieces):
        step = data.draw(st.integers(1, 4))
        said += detokenizer.feed(range(at, min(at + step, len(pieces))))
        assert text.startswith(said)
        at += step
    assert said + detokenizer.flush() == text


@settings(deadline=None)
@given(st.data())
def test_the_prompt_s_last_tokens_do_not_come_again(data: st.DataObject) -> None:
    prompt, text = data.draw(TEXTS), data.draw(TEXTS)
    pieces = data.draw(split_bytes((prompt + text).encode()))
    at = len(prompt.encode())
    lengths = [len(b"".join(pieces[:number])) for number in range(len(pieces) + 1)]
    if at not in lengths:
        return
    num_prompt_tokens = lengths.index(at)
    detokenizer = Detokenizer(Pieces(pieces).decode, range(num_prompt_tokens))
    said = "".join(detokenizer.feed((token,)) for token in range(num_prompt_tokens, len(pieces)))
    if not prompt.endswith("\ufffd"):
        assert said + detokenizer.flush() == text


@settings(deadline=None)
@given(TEXTS)
def test_text_is_whole_with_byte_fallback(text: str) -> None:
    text = text.replace("\ufffd", "")
    pieces: list[bytes] = []
    for character in text:
        data = character.encode()
        pieces.extend(bytes((byte,)) for byte in data) if character > "é" else pieces.append(data)
    detokenizer = Detokenizer(FallbackPieces(pieces).decode)
    said = "".join(detokenizer.feed((token,)) for token in range(len(pieces)))
    assert said + detokenizer.flush() == text


def test_characters_that_always_straddle_tokens_come_out_all_the_same() -> None:
    text = "你好" * 200
    data = text.encode()
    pieces = [data[:1], *(data[at : at + 3] for at in range(1, len(data), 3))]
    longest = 0

    def decode(token_ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return Pieces(pieces).decode(token_ids)

    detokenizer = Detokenizer(decode)
    said = "".join(detokenizer.feed((token,)) for token in range(len(pieces)))
    assert said + detokenizer.flush() == text
    assert longest <= 2 * MAX_HELD_TOKENS


def test_bytes_that_never_become_a_character_are_given_up_at_a_bounded_cost() -> None:
    pieces = [b"\xff"] * 500 + [bytes((byte,)) for byte in "ü!".encode()]
    longest = 0

    def decode(token_ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return Pieces(pieces).decode(token_ids)

    detokenizer = Detokenizer(decode)
    said = "".join(detokenizer.feed((token,)) for token in range(len(pieces)))
    assert said + detokenizer.flush() == "\ufffd" * 500 + "ü!"
    assert longest <= 2 * MAX_HELD_TOKENS


def test_control_tokens_do_not_pile_up() -> None:
    pieces = [b"hello", *[b""] * 500, b" world"]
    longest = 0

    def decode(token_ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return Pieces(pieces).decode(token_ids)

    detokenizer = Detokenizer(decode)
    assert "".join(detokenizer.feed((token,)) for token in range(len(pieces))) == "hello world"
    assert longest < 5


def first_stop(text: str, stops: Sequence[str]) -> str | None:
    """The stop string that is complete first; the longest of those that end together."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return max(found, key=len)
    return None


def before_stop(text: str, stops: Sequence[str]) -> str:
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))]
    return text


SMALL_TEXTS = st.text("ab.", max_size=30)
STOPS = st.lists(st.text("ab.", min_size=1, max_size=5), min_size=1, max_size=4)


@settings(deadline=None)
@given(st.lists(SMALL_TEXTS), STOPS)
def test_a_stop_string_ends_the_text_however_it_is_split(
    parts: list[str], stops: list[str]
) -> None:
    text = "".join(parts)
    scanner = StopScanner(stops)
    said = ""
    for part in parts:
        said += scanner.feed(part)
        assert before_stop(text, stops).startswith(said)
    said += scanner.flush()
    assert said == before_stop(text, stops)
    assert scanner.found == first_stop(text, stops)


@settings(deadline=None)
@given(st.lists(SMALL_TEXTS), STOPS)
def test_no_more_is_held_back_than_may_begin_a_stop_string(
    parts: list[str], stops: list[str]
) -> None:
    scanner = StopScanner(stops)
    seen = said = ""
    for part in parts:
        seen += part
        said += scanner.feed(part)
        if scanner.found is None:
            held = seen[len(said) :]
            assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def make_choice(stops: tuple[str, ...] = (), min_tokens: int = 0) -> Choice:
    sampling = Sampling(max_tokens=100, min_tokens=min_tokens)
    request = TokenRequest(request_id="one", prompt_token_ids=(33,), sampling=sampling)
    return Choice(0, request, ByteTokenizer(), stops)


def delta_of(text: str, finish_reason: str | None = None) -> TokenDelta:
    tokens = tuple(text.encode())
    logprobs = tuple(TokenLogprob(token_id=token, logprob=-1.0) for token in tokens)
    return TokenDelta(
        request_id="one", new_token_ids=tokens, logprobs=logprobs, finish_reason=finish_reason
    )


def test_tokens_behind_the_stop_string_are_not_counted() -> None:
    choice = make_choice(stops=("END",))
    choice.feed(delta_of("some END of it", finish_reason="length"))
    piece = choice.take()
    assert (piece.text, piece.finish_reason) == ("some ", "stop")
    assert choice.num_tokens == len("some END") == len(piece.logprobs)


def test_a_text_that_ends_in_half_a_stop_string_is_given_out_in_full() -> None:
    choice = make_choice(stops=("END",))
    choice.feed(delta_of("some EN"))
    assert choice.take().text == "some "
    choice.feed(delta_of("", finish_reason="stop"))
    piece = choice.take()
    assert (piece.text, piece.finish_reason) == ("EN", "stop")


def test_stop_strings_within_min_tokens_are_text() -> None:
    choice = make_choice(stops=("x",), min_tokens=4)
    choice.feed(delta_of("axbxcxd"))
    piece = choice.take()
    assert (piece.text, piece.finish_reason) == ("axbxc", "stop")


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_half_a_character_is_given_out_when_nothing_follows(reason: str) -> None:
    choice = make_choice()
    token_ids = tuple("a😀".encode()[:-1])
    choice.feed(TokenDelta(request_id="one", new_token_ids=token_ids, finish_reason=reason))
    piece = choice.take()
    assert (piece.text, piece.finish_reason) == ("a\ufffd", reason)
