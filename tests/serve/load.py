"""Many streams at once, as clients see them: the text, and the longest pause in it."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp


@dataclass(frozen=True, slots=True)
class Answer:
    """One stream, read to its end."""

    number: int
    text: str
    error: str | None
    longest_pause_s: float


async def stream_all(
    url: str,
    model: str,
    *,
    requests: int,
    at_once: int,
    after_s: float = 0.0,
    disturb: Callable[[], None] | None = None,
    max_tokens: int = 64,
    **options: Any,
) -> list[Answer]:
    """Run them `at_once` at a time; `disturb` is called once, `after_s` seconds into it."""
    waiting = list(range(requests))
    answers: list[Answer] = []
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)

    async def client(session: aiohttp.ClientSession) -> None:
        while waiting:
            number = waiting.pop(0)
            body = {
                "model": model,
                "prompt": f"request {number % 40} says",
                "max_tokens": max_tokens,
                "temperature": 0,
                "stream": True,
                "ignore_eos": True,
                **options,
            }
            answers.append(await _one(session, url, number, body))

    async def trouble() -> None:
        await asyncio.sleep(after_s)
        if disturb is not None:
            await asyncio.to_thread(disturb)

    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(trouble(), *(client(session) for _ in range(at_once)))
    return sorted(answers, key=lambda answer: answer.number)


async def _one(
    session: aiohttp.ClientSession, url: str, number: int, body: dict[str, Any]
) -> Answer:
    text, error, longest_s, last_s = "", None, 0.0, time.monotonic()
    try:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                return Answer(number, "", f"{answer.status}: {await answer.text()}", 0.0)
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                now_s = time.monotonic()
                longest_s, last_s = max(longest_s, now_s - last_s), now_s
                if line.startswith(b"data: [DONE]"):
                    return Answer(number, text, None, longest_s)
                event = json.loads(line[6:])
                if "error" in event:
                    return Answer(number, text, json.dumps(event), longest_s)
                text += "".join(choice["text"] for choice in event["choices"])
            error = "the stream ended without [DONE]"
    except aiohttp.ClientError as failure:
        error = repr(failure)
    return Answer(number, text, error, longest_s)
