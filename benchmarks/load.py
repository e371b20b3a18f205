"""The load: streaming OpenAI requests, so many at a time, and what each one saw.

Knows an address and a model, not which server is behind. Runs as a process of its own
(`python -m benchmarks.load < load.json`), because it shares two cores with what it measures:
while answers stream in it only notes times and keeps bytes; it parses when all is over.
"""

import asyncio
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from benchmarks.connection import Connection, Exchange
from benchmarks.load_result import LoadResult, summary

ENDPOINTS = {"completions": "/completions", "chat": "/chat/completions"}
# What the first event with text has and the others lack: an opening chat event carries "" only.
TEXT_FIELDS = {"completions": b'"text":"', "chat": b'"content":"'}


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
    return summary(
        done,
        concurrency=load.concurrency,
        num_requests=load.num_requests,
        asked_tokens=load.output_tokens,
        wall_s=wall_s,
        client_cpu_share=cpu_s / wall_s,
    )


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


async def _connect(load: Load) -> Connection:
    address = urlsplit(load.base_url)
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Connection(TEXT_FIELDS[load.api]),
        address.hostname or "127.0.0.1",
        address.port or 80,
    )
    return connection


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


if __name__ == "__main__":
    main()
