"""The load of `benchmarks.faults`: clients that note each token and the pauses between them.

Each sends its requests one after the other. It behaves as client libraries do: it takes a new
connection where the server says `Connection: close`; a connection that is refused, or that was kept
from the answer before and is closed without a byte of the next one, is tried anew and counted. All
else that goes wrong is a failed request. Knows nothing of faults.
"""

import asyncio
import difflib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import aiohttp

from benchmarks.load import prompt_of

REFUSED_S = 10.0  # how long a client asks again where nobody listens
ASK_AGAIN_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """So many clients at once; `late_clients` more begin when they are let in."""

    base_url: str  # with the /v1
    model: str = "demo"
    clients: int
    late_clients: int = 0
    requests_per_client: int
    output_tokens: int  # of a request on average
    timeout_s: float = 300.0  # of one request: its engine may start several times meanwhile

    @property
    def num_requests(self) -> int:
        return (self.clients + self.late_clients) * self.requests_per_client


@dataclass(slots=True, kw_only=True)
class Told:
    """What one request brought to its client. Times are the clock's, in seconds."""

    number: int
    sent_at_s: float = 0.0
    ended_at_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    failure: str | None = None
    longest_pause_s: float = 0.0  # without a byte, the wait for the first one too
    reconnects: int = 0


def tokens_asked(traffic: Traffic, number: int) -> int:
    """Half as many to one and a half times: else all clients would end their answers at once."""
    return traffic.output_tokens // 2 + number * 7919 % (traffic.output_tokens + 1)


def prompt(number: int) -> str:
    return prompt_of(0, number)


def mark(number: int) -> str:
    """A part of this request's prompt that no other one has."""
    return f"is number {number}."


async def run(
    traffic: Traffic, on_token: Callable[[], None], let_in: asyncio.Event | None = None
) -> list[Told]:
    """All answers by request; `on_token` hears of each token."""
    answers: list[Told] = []

    async def client(index: int) -> None:
        if index >= traffic.clients and let_in is not None:
            await let_in.wait()
        async with _session(traffic) as session:
            for each in range(traffic.requests_per_client):
                told = Told(number=index * traffic.requests_per_client + each)
                await _ask(session, traffic, told, on_token)
                answers.append(told)

    await asyncio.gather(*map(client, range(traffic.clients + traffic.late_clients)))
    return sorted(answers, key=lambda told: told.number)


def difference(expected: Sequence[int], got: Sequence[int]) -> tuple[int, int]:
    """Tokens that are lost, and tokens that came although they are not in the expected answer."""
    if list(expected) == list(got):
        return 0, 0
    matcher = difflib.SequenceMatcher(a=expected, b=got, autojunk=False)
    same = sum(block.size for block in matcher.get_matching_blocks())
    return len(expected) - same, len(got) - same


def _session(traffic: Traffic) -> aiohttp.ClientSession:
    """One connection; the trace tells whether a request had it for itself from the start."""

    async def reused(_: Any, context: SimpleNamespace, __: Any) -> None:
        context.trace_request_ctx["is_reused"] = True

    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(reused)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=1),
        timeout=aiohttp.ClientTimeout(total=None),
        trace_configs=[trace],
    )


async def _ask(
    session: aiohttp.ClientSession, traffic: Traffic, told: Told, on_token: Callable[[], None]
) -> None:
    told.sent_at_s, began_s = time.time(), time.perf_counter()
    noted = _Noted(told, began_s, on_token)
    try:
        async with asyncio.timeout(traffic.timeout_s):
            while True:
                trace = {"is_reused": False}
                try:
                    told.failure = await _attempt(session, traffic, noted, trace)
                    break
                except aiohttp.ClientConnectorError:
                    if time.perf_counter() - began_s > REFUSED_S:
                        raise
                except aiohttp.ServerDisconnectedError:
                    if not trace["is_reused"]:
                        raise
                told.reconnects += 1
                await asyncio.sleep(ASK_AGAIN_S)
    except TimeoutError:
        told.failure = f"no end after {traffic.timeout_s:.0f} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        told.failure = f"{type(error).__name__}: {error}"
    noted.heard()
    told.ended_at_s = time.time()


async def _attempt(
    session: aiohttp.ClientSession, traffic: Traffic, noted: "_Noted", trace: dict[str, bool]
) -> str | None:
    """One try; returns what was wrong with the answer."""
    body = {
        "model": traffic.model,
        "prompt": prompt(noted.told.number),
        "max_tokens": tokens_asked(traffic, noted.told.number),
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    url = f"{traffic.base_url}/completions"
    async with session.post(url, json=body, trace_request_ctx=trace) as answer:
        if answer.status != 200:
            return f"{answer.status}: {(await answer.text())[:200]}"
        async for line in answer.content:
            noted.heard()
            if line.startswith(b"data: [DONE]"):
                return None
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    return f"error in the stream: {str(event['error'])[:200]}"
                noted.take(_token_ids(event["choices"]))
    return "the stream ended without [DONE]"


def _token_ids(choices: Iterable[dict[str, Any]]) -> Iterable[int]:
    for choice in choices:
        yield from choice.get("token_ids") or ()


class _Noted:
    """Notes the tokens of one request, and the pauses."""

    def __init__(self, told: Told, began_s: float, on_token: Callable[[], None]) -> None:
        self.told = told
        self._on_token = on_token
        self._last_s = began_s

    def heard(self) -> None:
        """Bytes came, or the end."""
        now_s = time.perf_counter()
        self.told.longest_pause_s = max(self.told.longest_pause_s, now_s - self._last_s)
        self._last_s = now_s

    def take(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            self.told.token_ids.append(token_id)
            self._on_token()
