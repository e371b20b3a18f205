"""What counts as a failed request, and what as a client library's second try."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import fault_load
from benchmarks.fault_load import Told, Traffic, difference, mark, prompt, run, tokens_asked

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
Answer = Callable[[int, int, asyncio.StreamWriter], Awaitable[bool]]


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def tokens(*token_ids: int) -> bytes:
    event = {"choices": [{"text": "x", "token_ids": list(token_ids)}]}
    return chunk(b"data: " + json.dumps(event).encode() + b"\n\n")


DONE = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[str]:
    """`answer` gets the connection's number and the request's on it; False: it closes."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connection, request = connections, 0
        connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                if not await answer(connection, request, writer):
                    return
                request += 1
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        host, port = listening.sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}/v1"


async def ask(answer: Answer, requests: int = 2) -> list[Told]:
    async with server(answer) as url:
        traffic = Traffic(
            base_url=url, clients=1, requests_per_client=requests, output_tokens=4, timeout_s=20
        )
        return await run(traffic, lambda: None)


async def test_whole_answers_on_one_connection() -> None:
    async def answer(connection: int, request: int, writer: asyncio.StreamWriter) -> bool:
        assert connection == 0
        writer.write(HEAD + b"\r\n" + tokens(1, 2) + tokens(3) + DONE)
        return True

    told = await ask(answer)
    assert [(t.token_ids, t.failure, t.reconnects) for t in told] == [([1, 2, 3], None, 0)] * 2


async def test_a_server_that_says_it_closes_is_believed() -> None:
    async def answer(connection: int, request: int, writer: asyncio.StreamWriter) -> bool:
        assert request == 0
        writer.write(HEAD + b"Connection: close\r\n\r\n" + tokens(1) + DONE)
        return False

    assert [(t.failure, t.reconnects) for t in await ask(answer)] == [(None, 0)] * 2


async def test_a_kept_connection_closed_without_a_byte_is_tried_anew_and_counted() -> None:
    async def answer(connection: int, request: int, writer: asyncio.StreamWriter) -> bool:
        if request == 1:
            return False
        writer.write(HEAD + b"\r\n" + tokens(1) + DONE)
        return True

    assert [(t.failure, t.reconnects) for t in await ask(answer)] == [(None, 0), (None, 1)]


async def test_a_new_connection_closed_without_a_byte_is_a_failure() -> None:
    async def answer(connection: int, request: int, writer: asyncio.StreamWriter) -> bool:
        return False

    (told,) = await ask(answer, 1)
    assert "ServerDisconnected" in (told.failure or "")


async def test_an_answer_that_breaks_off_is_a_failure_with_what_came_of_it() -> None:
    async def answer(connection: int, request: int, writer: asyncio.StreamWriter) -> bool:
        writer.write(HEAD + b"\r\n" + tokens(1, 2))
        await writer.drain()
        return False

    (told,) = await ask(answer, 1)
    assert told.failure is not None
    assert told.token_ids == [1, 2]


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (b"0\r\n\r\n", "without [DONE]"),
        (chunk(b'data: {"error": {"message": "gone"}}\n\n') + DONE, "gone"),
    ],
)
async def test_an_answer_with_an_error_or_without_its_end_is_a_failure(
    end: bytes, words: str
) -> None:
    async def answer(connection: int, request: int, writer: asyncio.StreamWriter) -> bool:
        writer.write(HEAD + b"\r\n" + tokens(1) + end)
        return False

    (told,) = await ask(answer, 1)
    assert words in (told.failure or "")


async def test_an_error_s_status_is_a_failure() -> None:
    async def answer(connection: int, request: int, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy")
        return True

    (told,) = await ask(answer, 1)
    assert told.failure == "503: busy"


async def test_a_refused_connection_is_tried_again_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fault_load, "REFUSED_S", 0.05)
    monkeypatch.setattr(fault_load, "ASK_AGAIN_S", 0.01)
    async with server(lambda *_: asyncio.sleep(0, False)) as url:
        pass
    traffic = Traffic(base_url=url, clients=1, requests_per_client=1, output_tokens=4)
    (told,) = await run(traffic, lambda: None)
    assert told.reconnects > 0
    assert "Connector" in (told.failure or "")


async def test_late_clients_wait_until_they_are_let_in() -> None:
    let_in, came = asyncio.Event(), []

    async def answer(connection: int, request: int, writer: asyncio.StreamWriter) -> bool:
        came.append(connection)
        writer.write(HEAD + b"\r\n" + tokens(1) + DONE)
        return True

    async with server(answer) as url:
        traffic = Traffic(
            base_url=url, clients=1, late_clients=1, requests_per_client=2, output_tokens=4
        )

        def on_token() -> None:
            if len(came) == 2:
                let_in.set()

        told = await run(traffic, on_token, let_in)
    assert came == [0, 0, 1, 1]
    assert [t.number for t in told] == [0, 1, 2, 3]


@given(st.lists(st.integers(0, 9), max_size=30), st.data())
def test_lost_and_repeated_tokens_are_counted(expected: list[int], data: st.DataObject) -> None:
    assert difference(expected, expected) == (0, 0)
    cut = data.draw(st.integers(0, len(expected)))
    assert difference(expected, expected[:cut]) == (len(expected) - cut, 0)
    assert difference(expected, expected[:cut] + expected) == (0, cut)


@given(st.integers(0, 800), st.integers(0, 800))
def test_a_mark_is_in_one_prompt_only(one: int, other: int) -> None:
    assert (mark(one) in prompt(other)) == (one == other)


def test_clients_are_asked_for_different_lengths_that_come_to_the_average() -> None:
    traffic = Traffic(base_url="", clients=8, requests_per_client=100, output_tokens=48)
    asked = [tokens_asked(traffic, number) for number in range(800)]
    assert min(asked) == 24
    assert max(asked) == 72
    assert sum(asked) == pytest.approx(800 * 48, rel=0.02)
