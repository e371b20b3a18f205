"""What became of a load: its answers read, its times in milliseconds, when all is over."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.connection import Exchange, header


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


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    output_tokens: int


class BadAnswerError(Exception):
    """An answer that is not what was asked for; the message says how."""


def summary(
    exchanges: Sequence[Exchange],
    *,
    concurrency: int,
    num_requests: int,
    asked_tokens: int,
    wall_s: float,
    client_cpu_share: float,
) -> LoadResult:
    """Reads every answer; one with other than `asked_tokens` tokens has failed."""
    answers, failures, hashes = [], [], []
    ttfts_ms, tpots_ms = [], []
    for exchange in exchanges:
        try:
            answer = read_answer(exchange, asked_tokens)
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
        concurrency=concurrency,
        num_requests=num_requests,
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


def read_answer(exchange: Exchange, asked_tokens: int) -> Answer:
    """Raises `BadAnswerError`."""
    if exchange.failure:
        raise BadAnswerError(exchange.failure)
    head, _, body = exchange.received.partition(b"\r\n\r\n")
    status = head.split(b"\r\n", 1)[0].decode(errors="replace")
    if " 200 " not in status + " ":
        raise BadAnswerError(f"{status}: {body[:200].decode(errors='replace')}")
    if header(head, b"transfer-encoding") == b"chunked":
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
    if output_tokens != asked_tokens:
        raise BadAnswerError(f"{output_tokens} tokens instead of {asked_tokens}")
    if exchange.first_text_s is None:
        raise BadAnswerError("no text")
    return Answer("".join(text or "" for text in texts), output_tokens)


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
