import asyncio
from contextlib import aclosing

import pytest
from test_openai_harness import FAST, GatedEngine, Ladder, answer_of, serving, token_request, until

from deployments.engines.fake import Script
from deployments.engines.protocol import TokenDelta
from deployments.errors import LadderExhausted
from deployments.faults import Fault
from deployments.oom import Cause

DIES_FOR_GOOD = Script(
    step_s=0,
    faults=(
        Fault(life=1, after_tokens=5),
        Fault(life=2, phase="load_model"),
        Fault(life=3, phase="load_model"),
    ),
)


def text_of(deltas: list[TokenDelta]) -> str:
    return bytes(token for delta in deltas for token in delta.new_token_ids).decode()


async def test_a_stream_has_every_token_once_and_ends_by_itself(ladder: Ladder) -> None:
    async with serving(ladder) as served:
        deltas = [delta async for delta in served.streams.stream(token_request("one"))]
        assert text_of(deltas) == answer_of("hello", 20)
        assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
        assert served.is_idle


async def test_a_stream_goes_on_when_the_engine_dies_in_the_middle(ladder: Ladder) -> None:
    script = Script(step_s=0, faults=(Fault(life=1, after_tokens=7, cause=Cause.KILLED),))
    async with serving(ladder, script) as served:
        deltas = [delta async for delta in served.streams.stream(token_request("one"))]
        assert text_of(deltas) == answer_of("hello", 20)
        assert served.keeper.num_replayed == 1


async def test_many_streams_each_get_their_own_tokens(ladder: Ladder) -> None:
    async def consume(prompt: str) -> str:
        stream = served.streams.stream(token_request(prompt, prompt))
        return text_of([delta async for delta in stream])

    async with serving(ladder) as served:
        prompts = [f"prompt {number}" for number in range(20)]
        texts = await asyncio.gather(*map(consume, prompts))
        assert texts == [answer_of(prompt, 20) for prompt in prompts]


async def test_a_consumer_that_stops_reading_frees_its_request(ladder: Ladder) -> None:
    async with serving(ladder) as served:
        async with aclosing(served.streams.stream(token_request("one", max_tokens=2000))) as stream:
            await anext(stream)
            assert served.engine.num_running == 1
        assert served.is_idle


async def test_a_cancelled_consumer_frees_its_request(ladder: Ladder) -> None:
    async def consume() -> None:
        async for _ in served.streams.stream(token_request("one", max_tokens=2000)):
            pass

    async with serving(ladder) as served:
        task = asyncio.create_task(consume())
        await until(lambda: served.engine.num_running == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert served.is_idle


async def test_a_consumer_that_leaves_while_the_engine_is_away_is_not_replayed(
    ladder: Ladder,
) -> None:
    async def consume() -> None:
        async for _ in served.streams.stream(token_request("one")):
            pass

    engine = GatedEngine()
    async with serving(ladder, engine=engine) as served:
        task = asyncio.create_task(consume())
        await until(lambda: len(served.keeper.journal) == 1 and not served.keeper.is_serving)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        engine.gate.set()
        await until(lambda: served.keeper.is_serving)
        assert served.is_idle
        assert served.keeper.num_replayed == 0


async def test_each_consumer_hears_of_giving_up_by_an_error_of_its_own(ladder: Ladder) -> None:
    async def consume(name: str) -> LadderExhausted:
        with pytest.raises(LadderExhausted) as caught:
            async for _ in served.streams.stream(token_request(name)):
                pass
        return caught.value

    async with serving(ladder, DIES_FOR_GOOD) as served:
        first, second = await asyncio.gather(consume("one"), consume("two"))
        assert first is not second
        assert "no smaller settings are left" in str(first)
        assert len(served.streams) == 0


async def test_a_request_after_giving_up_is_refused(ladder: Ladder) -> None:
    async with serving(ladder, DIES_FOR_GOOD) as served:
        for name in ("one", "two"):
            with pytest.raises(LadderExhausted):
                async for _ in served.streams.stream(token_request(name)):
                    pass


async def test_several_requests_of_one_consumer_arrive_in_one_inbox(ladder: Ladder) -> None:
    requests = [token_request(name, max_tokens=5) for name in "abc"]
    texts = dict.fromkeys("abc", b"")
    async with serving(ladder, FAST) as served, served.streams.open(requests) as inbox:
        async for deltas in inbox:
            for delta in deltas:
                texts[delta.request_id] += bytes(delta.new_token_ids)
    assert texts == dict.fromkeys("abc", answer_of("hello", 5).encode())


async def test_an_ended_request_is_freed_while_the_others_go_on(ladder: Ladder) -> None:
    requests = [token_request(name, max_tokens=50) for name in "ab"]
    lengths = {"a": 0, "b": 0}
    async with serving(ladder) as served, served.streams.open(requests) as inbox:
        async for deltas in inbox:
            for delta in deltas:
                lengths[delta.request_id] += len(delta.new_token_ids)
            if lengths["a"] and "a" in served.keeper.journal:
                await inbox.end("a")
                ended_at = lengths["a"]
        assert lengths == {"a": ended_at, "b": 50}
        assert (served.engine.num_running, len(served.keeper.journal)) == (0, 0)


async def test_a_slow_consumer_gets_what_has_piled_up_in_one_turn(ladder: Ladder) -> None:
    async with (
        serving(ladder) as served,
        served.streams.open([token_request("a", max_tokens=30)]) as inbox,
    ):
        await until(lambda: served.engine.num_running == 0)
        turns = [deltas async for deltas in inbox]
        assert len(turns) == 1
        assert text_of(turns[0]) == answer_of("hello", 30)
