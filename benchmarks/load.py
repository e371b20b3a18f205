"""The load: streaming OpenAI requests, so many at a time, and what each one saw.

Knows an address and a model, not which server is behind. Runs as a process of its own
(`python -m benchmarks.load < load.json`), because it shares two cores with what it measures:
while answers stream in it only notes times and keeps bytes; it parses when all is over.
"""

import asyncio
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

ENDPOINTS = {"completions": "/completions", "chat": "/chat/completions"}
# What the first event with text has and the others lack: an opening chat event carries "" only.
TEXT_FIELDS = {"completions": b'"text":"', "chat": b'"content":"'}
END_OF_BODY = b"\n0\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    base_url: str  # with the /v1
    model: str
    api: str = "completions"
    concurrency: int
    num_requests: int
    output_tokens: int = 64
    seed: int = 0  # other prompts for each round: a prefix cache shall not know them
    timeout_s: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    concurrency: int
    num_requests: int
    failed: int
    failures: list[str]  # the first three, in words
    wall_s: float
    output_tokens: int
    tokens_per_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    tpot_p50_ms: float | None
    text_hashes: list[str]  # by request; "" for a failed one
    client_cpu_share: float  # of one core, while the load ran


@dataclass(slots=True)
class Exchange:
    """One request on the wire, as noted while it ran."""

    sent_s: float
    first_text_s: float | None = None
    last_byte_s: float | None = None
    received: bytes = b""
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    output_tokens: int


class BadAnswerError(Exception):
    """An answer that is not what was asked for; the message says how."""


def main() -> None:
    load = Load(**json.load(sys.stdin))
    json.dump(asdict(asyncio.run(run_load(load))), sys.stdout)


async def run_load(load: Load) -> LoadResult:
    requests = [_request_bytes(load, number) for number in range(load.num_requests)]
    exchanges: list[Exchange | None] = [None] * load.num_requests
    numbers = iter(range(load.num_requests))
    cpu_before_s, started_s = time.process_time(), time.perf_counter()
    await asyncio.gather(
        *(_client(load, requests, numbers, exchanges) for _ in range(load.concurrency))
    )
    wall_s = time.perf_counter() - started_s
    cpu_s = time.process_time() - cpu_before_s
    done = [exchange for exchange in exchanges if exchange is not None]
    return _summary(load, done, wall_s, cpu_s / wall_s)


async def _client(
    load: Load,
    requests: list[bytes],
    numbers: Iterator[int],
    exchanges: list[Exchange | None],
) -> None:
    """Sends one request after the other on one connection, as a client library does."""
    connection: Connection | None = None
    for number in numbers:
        exchange = exchanges[number] = Exchange(sent_s=time.perf_counter())
        try:
            async with asyncio.timeout(load.timeout_s):
                if connection is None or connection.is_closed:
                    connection = await _connect(load)
                await connection.exchange(requests[number], exchange)
        except TimeoutError:
            exchange.failure = f"no end after {load.timeout_s:.0f} s"
        except OSError as error:
            exchange.failure = f"{type(error).__name__}: {error}"
        if exchange.failure and connection is not None:
            connection.close()
            connection = None
    if connection is not None:
        connection.close()


async def _connect(load: Load) -> "Connection":
    address = urlsplit(load.base_url)
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Connection(TEXT_FIELDS[load.api]),
        address.hostname or "127.0.0.1",
        address.port or 80,
    )
    return connection


class Connection(asyncio.Protocol):
    """HTTP/1.1, kept alive. The end of an answer is seen in its last bytes."""

    def __init__(self, text_field: bytes) -> None:
        self._text_field = text_field
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[None] | None = None
        self._received = bytearray()
        self.is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def exchange(self, request: bytes, exchange: Exchange) -> None:
        assert self._transport is not None
        self._exchange, self._received = exchange, bytearray()
        self._done = asyncio.get_running_loop().create_future()
        exchange.sent_s = time.perf_counter()
        self._transport.write(request)
        await self._done
        exchange.received = bytes(self._received)

    def data_received(self, data: bytes) -> None:
        now_s, exchange = time.perf_counter(), self._exchange
        if exchange is None or self._done is None or self._done.done():
            self.close()
            return
        if exchange.first_text_s is None and self._has_text(data):
            exchange.first_text_s = now_s
        exchange.last_byte_s = now_s
        self._received += data
        if self._received.endswith(END_OF_BODY) or self._is_complete_error():
            self._done.set_result(None)

    def _has_text(self, data: bytes) -> bool:
        at = data.find(self._text_field)
        while at >= 0:
            if data[at + len(self._text_field) :][:1] != b'"':
                return True
            at = data.find(self._text_field, at + 1)
        return False

    def _is_complete_error(self) -> bool:
        """Errors come with a length, not in chunks."""
        if self._received.startswith(b"HTTP/1.1 200"):
            return False
        head, separator, body = bytes(self._received).partition(b"\r\n\r\n")
        length = _header(head, b"content-length")
        return bool(separator) and length is not None and len(body) >= int(length)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(f"connection closed: {exc or 'by server'}"))

    def close(self) -> None:
        self.is_closed = True
        if self._transport is not None:
            self._transport.abort()


def _request_bytes(load: Load, number: int) -> bytes:
    prompt = prompt_of(load.seed, number)
    body: dict[str, object] = {
        "model": load.model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": load.output_tokens,
        "ignore_eos": True,
    }
    if load.api == "chat":
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    payload = json.dumps(body).encode()
    address = urlsplit(load.base_url)
    head = (
        f"POST {address.path}{ENDPOINTS[load.api]} HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Content-Type: application/json\r\nAuthorization: Bearer x\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


def prompt_of(seed: int, number: int) -> str:
    """A few dozen tokens that differ from the first word on."""
    digits = hashlib.sha256(f"{seed} {number}".encode()).hexdigest()
    return f"{digits[:12]} is number {number}. Tell me about {digits[12:24]}, please."


def _summary(
    load: Load, exchanges: list[Exchange], wall_s: float, client_cpu_share: float
) -> LoadResult:
    answers, failures, hashes = [], [], []
    ttfts_ms, tpots_ms = [], []
    for exchange in exchanges:
        try:
            answer = _read_answer(exchange, load)
        except BadAnswerError as bad:
            failures.append(str(bad))
            hashes.append("")
            continue
        assert exchange.first_text_s is not None
        assert exchange.last_byte_s is not None
        answers.append(answer)
        hashes.append(hashlib.sha256(answer.text.encode()).hexdigest()[:8])
        ttfts_ms.append(1e3 * (exchange.first_text_s - exchange.sent_s))
        if answer.output_tokens > 1:
            streaming_s = exchange.last_byte_s - exchange.first_text_s
            tpots_ms.append(1e3 * streaming_s / (answer.output_tokens - 1))
    output_tokens = sum(answer.output_tokens for answer in answers)
    return LoadResult(
        concurrency=load.concurrency,
        num_requests=load.num_requests,
        failed=len(failures),
        failures=failures[:3],
        wall_s=wall_s,
        output_tokens=output_tokens,
        tokens_per_s=output_tokens / wall_s,
        ttft_p50_ms=percentile(ttfts_ms, 50),
        ttft_p99_ms=percentile(ttfts_ms, 99),
        tpot_p50_ms=percentile(tpots_ms, 50),
        text_hashes=hashes,
        client_cpu_share=client_cpu_share,
    )


def _read_answer(exchange: Exchange, load: Load) -> Answer:
    if exchange.failure:
        raise BadAnswerError(exchange.failure)
    head, _, body = exchange.received.partition(b"\r\n\r\n")
    status = head.split(b"\r\n", 1)[0].decode(errors="replace")
    if " 200 " not in status + " ":
        raise BadAnswerError(f"{status}: {body[:200].decode(errors='replace')}")
    if _header(head, b"transfer-encoding") == b"chunked":
        body = b"".join(_chunks(body))
    events = [line[6:].strip() for line in body.splitlines() if line.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        raise BadAnswerError("the stream ended without [DONE]")
    texts, output_tokens = [], None
    for event in map(json.loads, events[:-1]):
        if "error" in event:
            raise BadAnswerError(f"error in the stream: {event['error']}")
        for choice in event["choices"]:
            texts.append(choice["text"] if "text" in choice else choice["delta"].get("content"))
        if usage := event.get("usage"):
            output_tokens = usage["completion_tokens"]
    if output_tokens is None:
        raise BadAnswerError("the stream ended without its usage")
    if output_tokens != load.output_tokens:
        raise BadAnswerError(f"{output_tokens} tokens instead of {load.output_tokens}")
    if exchange.first_text_s is None:
        raise BadAnswerError("no text")
    return Answer("".join(text or "" for text in texts), output_tokens)


def _header(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip().lower()
    return None


def _chunks(body: bytes) -> Iterator[bytes]:
    at = 0
    while True:
        end_of_size = body.index(b"\r\n", at)
        size = int(body[at:end_of_size].split(b";")[0], 16)
        if size == 0:
            return
        yield body[end_of_size + 2 : end_of_size + 2 + size]
        at = end_of_size + 2 + size + 2


def percentile(values: list[float], percent: float) -> float | None:
    """The smallest value that at least `percent` of them do not exceed."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


if __name__ == "__main__":
    main()
