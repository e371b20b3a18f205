"""Over real connections: streaming, leaving, reading slowly, an engine that dies."""

import asyncio
import json
import socket

import httpx
import openai
import pytest
from test_openai_harness import (
    GatedEngine,
    Ladder,
    answer_of,
    client_of,
    listening,
    serving,
    texts_of,
    until,
)

from deployments.engines.fake import Script
from deployments.faults import Fault
from deployments.oom import Cause

CHAT_PROMPT = "user: hi\nassistant: "
HI = [{"role": "user", "content": "hi"}]
LONG = {"prompt": "hello", "max_tokens": 2000, "stream": True}
SLOW = Script(step_s=0.002)
NEVER_AGAIN = tuple(Fault(life=life, phase="load_model") for life in (2, 3))
DIES_FOR_GOOD = Script(
    step_s=0.001,
    faults=(Fault(life=1, after_tokens=5), *NEVER_AGAIN),
)


async def test_the_openai_client_chats(ladder: Ladder) -> None:
    async with (
        serving(ladder) as served,
        listening(served.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client,
    ):
        answer = await client.chat.completions.create(model="fake", messages=HI, max_tokens=20)
        assert answer.choices[0].message.content == answer_of(CHAT_PROMPT, 20)
        assert [model.id for model in (await client.models.list()).data] == ["fake"]
        assert (await client.models.retrieve("fake")).id == "fake"


async def test_the_openai_client_streams(ladder: Ladder) -> None:
    async with (
        serving(ladder) as served,
        listening(served.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client,
    ):
        stream = await client.chat.completions.create(
            model="fake",
            messages=HI,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(texts) == answer_of(CHAT_PROMPT, 20)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 20


async def test_the_openai_client_hears_errors_as_its_own(ladder: Ladder) -> None:
    async with (
        serving(ladder) as served,
        listening(served.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="fake", prompt="a", max_tokens=10**9)
        assert bad.value.param == "max_tokens"
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="other", prompt="a")


@pytest.mark.parametrize("cause", [Cause.KILLED, Cause.DEVICE_MEMORY])
async def test_streams_go_on_when_the_engine_dies_in_the_middle(
    ladder: Ladder, cause: Cause
) -> None:
    async def ask(number: int) -> str:
        asked = {"prompt": f"hello {number}", "max_tokens": 40, "stream": True}
        text = (await client.post("/v1/completions", json=asked)).text
        assert text.endswith("data: [DONE]\n\n")
        events = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
        return texts_of(events)[0]

    faults = (
        Fault(life=1, after_tokens=100, cause=cause),
        Fault(life=2, after_tokens=50, cause=cause),
    )
    async with (
        serving(ladder, Script(step_s=0.001, faults=faults)) as served,
        listening(served.app) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        texts = await asyncio.gather(*map(ask, range(8)))
        assert texts == [answer_of(f"hello {number}", 40) for number in range(8)]
        assert served.keeper.num_replayed >= 8
        assert served.is_idle


async def test_a_stop_string_is_found_across_a_replay(ladder: Ladder) -> None:
    full = answer_of("hello", 100)
    script = Script(step_s=0, faults=(Fault(life=1, after_tokens=22, cause=Cause.KILLED),))
    async with serving(ladder, script) as served, served.client() as client:
        asked = {"prompt": "hello", "max_tokens": 1000, "stop": full[20:24]}
        body = (await client.post("/v1/completions", json=asked)).json()
        assert body["choices"][0]["text"] == full[: full.index(full[20:24])]
        assert served.keeper.num_replayed == 1


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_requests(
    ladder: Ladder, path: str, stream: bool
) -> None:
    asked = {"prompt": "hello", "messages": HI, "max_tokens": 2000, "n": 3, "stream": stream}
    async with (
        serving(ladder, SLOW) as served,
        listening(served.app) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        call = asyncio.create_task(client.post(path, json=asked))
        await until(lambda: served.engine.num_running == 3)
        call.cancel()
        await until(lambda: served.is_idle)


async def test_a_client_that_leaves_while_the_engine_is_away_is_not_replayed(
    ladder: Ladder,
) -> None:
    engine = GatedEngine()
    async with (
        serving(ladder, engine=engine) as served,
        listening(served.app) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        call = asyncio.create_task(client.post("/v1/completions", json=LONG))
        await until(lambda: len(served.keeper.journal) == 1 and not served.keeper.is_serving)
        waiting = asyncio.create_task(client.post("/v1/completions", json=LONG))
        await until(lambda: served.keeper.num_waiting == 1)
        call.cancel()
        waiting.cancel()
        await until(lambda: served.is_idle and served.keeper.num_waiting == 0)
        assert not served.keeper.is_serving
        engine.gate.set()
        await until(lambda: served.keeper.is_serving)
        assert served.keeper.num_replayed == 0


async def test_a_stream_that_is_not_read_holds_no_slot(ladder: Ladder) -> None:
    body = json.dumps({**LONG, "n": 40, "max_tokens": 100}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    async with (
        serving(ladder, Script(step_s=0)) as served,
        listening(served.app, send_buffer_bytes=4096) as url,
    ):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            client.sendall(head.encode() + body)
            await until(lambda: served.engine.num_running == 40)
            await until(lambda: served.engine.num_running == 0)
            assert len(served.keeper.journal) == 0
            assert len(served.streams) == 40  # the server still has most of it to send
            assert client.recv(1) == b"H"  # one byte, and only now
        await until(lambda: served.is_idle)


async def test_giving_up_in_the_middle_ends_the_stream_with_an_error_event(
    ladder: Ladder,
) -> None:
    async with (
        serving(ladder, DIES_FOR_GOOD) as served,
        listening(served.app) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        text = (await client.post("/v1/completions", json=LONG)).text
        *events, last = [json.loads(line[6:]) for line in text.split("\n\n")[:-1]]
        assert texts_of(events) == {0: answer_of("hello", 5)}
        assert last["error"]["type"] == "server_error"
        assert last["error"]["code"] == "engine_failed"
        assert "[DONE]" not in text


async def test_the_openai_client_raises_at_the_error_event(ladder: Ladder) -> None:
    async with (
        serving(ladder, DIES_FOR_GOOD) as served,
        listening(served.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        stream = await client.completions.create(
            model="fake", prompt="hello", max_tokens=100, stream=True
        )
        with pytest.raises(openai.APIError, match="no smaller settings are left"):
            async for _ in stream:
                pass


async def test_giving_up_before_the_first_token_is_a_503(ladder: Ladder) -> None:
    script = Script(
        step_s=0.01,
        faults=(Fault(life=1), *NEVER_AGAIN),
    )
    for stream in (True, False):
        async with serving(ladder, script) as served, served.client() as client:
            response = await client.post("/v1/completions", json={**LONG, "stream": stream})
            assert response.status_code == 503
            assert response.headers["retry-after"] == "30"
            assert response.json()["error"]["code"] == "engine_failed"
            again = await client.post("/v1/completions", json=LONG)
            assert again.status_code == 503


async def test_a_request_waits_for_an_engine_that_is_loading(ladder: Ladder) -> None:
    async with (
        serving(ladder, Script(step_s=0, load_s=0.02), starts=False) as served,
        served.client() as client,
    ):
        call = asyncio.create_task(client.post("/v1/completions", json={"prompt": "hello"}))
        await until(lambda: served.keeper.num_waiting == 1)
        await served.keeper.start()
        assert (await call).json()["choices"][0]["text"] == answer_of("hello", 16)


async def test_a_request_that_waits_too_long_is_told_when_to_come_again(ladder: Ladder) -> None:
    async with serving(ladder, starts=False, wait_s=0.01) as served, served.client() as client:
        response = await client.post("/v1/completions", json={"prompt": "hello"})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "engine_busy"


async def test_a_bad_request_need_not_wait_for_the_engine(ladder: Ladder) -> None:
    async with serving(ladder, starts=False) as served, served.client() as client:
        asked = {"prompt": "hello", "max_tokens": 0}
        async with asyncio.timeout(1):
            response = await client.post("/v1/completions", json=asked)
        assert response.status_code == 400


async def test_a_request_is_checked_against_the_context_it_will_find(ladder: Ladder) -> None:
    engine = GatedEngine(Fault(life=2, phase="load_model"))
    async with serving(ladder, engine=engine) as served, served.client() as client:
        first = asyncio.create_task(client.post("/v1/completions", json={"prompt": "hello"}))
        await until(lambda: len(served.keeper.journal) == 1 and not served.keeper.is_serving)
        # Fits into the 1024 tokens that are loading, and the engine comes back with 512.
        asked = {"prompt": "a" * 700, "max_tokens": 5}
        late = asyncio.create_task(client.post("/v1/completions", json=asked))
        await until(lambda: served.keeper.num_waiting == 1)
        engine.gate.set()
        assert (await late).status_code == 400
        assert (await first).status_code == 200


async def test_a_mistake_of_ours_is_a_500_without_details(ladder: Ladder) -> None:
    async with serving(ladder) as served:
        served.keeper.admission = lambda **_: 1 / 0  # type: ignore[method-assign]
        transport = httpx.ASGITransport(app=served.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            response = await client.post("/v1/completions", json={"prompt": "hello"})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert "division" not in response.text


async def test_the_application_works_below_a_prefix(ladder: Ladder) -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount

    async with serving(ladder) as served:
        mounted = Starlette(routes=[Mount("/fake", served.app)])
        async with client_of(mounted) as client:
            response = await client.post("/fake/v1/completions", json={"prompt": "hello"})
            assert response.json()["choices"][0]["text"] == answer_of("hello", 16)
