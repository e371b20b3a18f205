"""Calls on their way to the engine."""

import asyncio
from collections.abc import Callable

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from test_openai_harness import client_of

from deployments import turns
from deployments.guards.turnstile import Turnstile
from deployments.turns import Turns

LONG_S = 60.0  # no test waits for that


class Calls:
    """An application that parses, tokenizes and hands over, with the event loop free between."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.may_end = asyncio.Event()
        self.app = Turnstile(
            Starlette(
                routes=[
                    Route("/v1/completions", self._call, methods=["POST"]),
                    Route("/v1/models", self._models),
                ]
            ),
            limit_s=LONG_S,
        )

    async def _call(self, request: Request) -> Response:
        name = (await request.body()).decode()
        for stage in ("parsed", "tokenized"):
            self.seen.append(f"{name} {stage}")
            await asyncio.sleep(0)
        if name == "wrong":
            raise ValueError(name)
        self.seen.append(f"{name} handed over")
        turns.over()
        await self.may_end.wait()
        return PlainTextResponse(name)

    async def _models(self, request: Request) -> Response:
        return PlainTextResponse("models")


async def test_the_first_of_a_burst_is_handed_over_before_the_second_is_parsed() -> None:
    calls = Calls()
    async with client_of(calls.app) as client:
        answers = [
            asyncio.create_task(client.post("/v1/completions", content=name)) for name in "abc"
        ]
        async with asyncio.timeout(5):
            while len(calls.seen) < 9:
                await asyncio.sleep(0)
        # None of them has ended, and each has all of its stages in one piece.
        assert [entry.split()[0] for entry in calls.seen] == [*"aaabbbccc"]
        calls.may_end.set()
        assert [(await answer).text for answer in answers] == [*"abc"]


async def test_a_call_that_fails_lets_the_next_pass() -> None:
    calls = Calls()
    calls.may_end.set()
    async with client_of(calls.app) as client:
        wrong = asyncio.create_task(client.post("/v1/completions", content="wrong"))
        right = asyncio.create_task(client.post("/v1/completions", content="right"))
        with pytest.raises(ValueError, match="wrong"):
            await wrong
        async with asyncio.timeout(5):
            assert (await right).text == "right"


async def test_what_is_no_model_call_waits_for_nobody() -> None:
    calls = Calls()
    async with client_of(calls.app) as client:
        with await calls.app._turns.take():
            async with asyncio.timeout(5):
                assert (await client.get("/v1/models")).text == "models"


async def test_who_takes_long_lets_the_others_pass() -> None:
    taking_long = Turns(limit_s=0.0)
    await taking_long.take()
    async with asyncio.timeout(5):
        await taking_long.take()


@pytest.mark.parametrize("ended_by", ["over", "end", "leaving its block"])
async def test_a_turn_is_passed_on_once(ended_by: str) -> None:
    """However often it ends, one of those that wait gets it."""
    line = Turns(limit_s=LONG_S)
    first = await line.take()
    later = [asyncio.create_task(line.take()) for _ in range(3)]
    await asyncio.sleep(0)
    end: Callable[[], object] = {
        "over": turns.over,
        "end": first.end,
        "leaving its block": lambda: first.__exit__(None, None, None),
    }[ended_by]
    for _ in range(3):
        end()
        await asyncio.sleep(0.01)
        assert [task.done() for task in later] == [True, False, False]
    for number in range(3):
        (await later[number]).end()
        await asyncio.sleep(0.01)


async def test_who_leaves_the_line_holds_nobody_up() -> None:
    line = Turns(limit_s=LONG_S)
    first = await line.take()
    leaves, stays = (asyncio.create_task(line.take()) for _ in range(2))
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.sleep(0)
    first.end()
    async with asyncio.timeout(5):
        await stays


async def test_who_leaves_as_its_turn_comes_passes_it_on() -> None:
    line = Turns(limit_s=LONG_S)
    first = await line.take()
    leaves, stays = (asyncio.create_task(line.take()) for _ in range(2))
    await asyncio.sleep(0)
    first.end()  # `leaves` has it, and has not run since
    leaves.cancel()
    async with asyncio.timeout(5):
        await stays


async def test_nobody_waits_after_the_last_has_left() -> None:
    line = Turns(limit_s=LONG_S)
    for _ in range(3):
        async with asyncio.timeout(5):
            with await line.take():
                pass
