"""What the load counts as an answer, and what it says of the others."""

import asyncio
import json

import pytest
from test_fault_load import DONE, HEAD, chunk, server

from benchmarks.load import Load, run_load
from benchmarks.load_result import LoadResult, percentile


def text(*words: str, tokens: int | None = None) -> bytes:
    events: list[dict[str, object]] = [{"choices": [{"text": word}]} for word in words]
    if tokens is not None:
        events.append({"choices": [], "usage": {"completion_tokens": tokens}})
    lines = (json.dumps(event, separators=(",", ":")) for event in events)
    return b"".join(chunk(f"data: {line}\n\n".encode()) for line in lines)


async def load_of(*answers: bytes) -> LoadResult:
    """One client, which asks for three tokens each time."""
    asked = iter(answers)

    async def answer(connection: int, request: int, writer: asyncio.StreamWriter) -> bool:
        writer.write(next(asked))
        return True

    async with server(answer) as url:
        return await run_load(
            Load(
                base_url=url,
                model="demo",
                concurrency=1,
                num_requests=len(answers),
                output_tokens=3,
                timeout_s=30,
            )
        )


async def test_whole_answers_are_counted_and_timed() -> None:
    whole = HEAD + b"\r\n" + text("a", "b", tokens=3) + DONE
    result = await load_of(whole, whole)
    assert (result.failed, result.output_tokens) == (0, 6)
    first, second = result.text_hashes
    assert first == second != ""
    assert result.ttft_p50_ms is not None
    assert result.tpot_p50_ms is not None


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (text("a", tokens=2) + DONE, "2 tokens instead of 3"),
        (text("a") + DONE, "without its usage"),
        (text("a", tokens=3) + b"0\r\n\r\n", "without [DONE]"),
        (text("", tokens=3) + DONE, "no text"),
    ],
)
async def test_an_answer_that_is_not_what_was_asked_for_has_failed_and_says_how(
    answer: bytes, failure: str
) -> None:
    result = await load_of(HEAD + b"\r\n" + answer)
    assert (result.failed, result.text_hashes) == (1, [""])
    assert failure in result.failures[0]


async def test_an_error_with_a_length_ends_its_request_and_the_next_goes_on() -> None:
    error = b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy"
    result = await load_of(error, HEAD + b"\r\n" + text("a", tokens=3) + DONE)
    assert result.failures == ["HTTP/1.1 503 Busy: busy"]
    assert result.output_tokens == 3


def test_a_percentile_is_one_of_the_values() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([3.0, 1.0, 2.0], 99) == 3.0
    assert percentile([], 50) is None
