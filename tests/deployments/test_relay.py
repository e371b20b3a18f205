"""A replica dies at any byte of its answer, and its relay's client never learns of it."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send
from test_openai_harness import Ladder, listening, until
from test_saying_engine import Saying, SayingEngine

from deployments.keeper import Keeper
from deployments.openai.app import build_openai_app
from deployments.openai.tokenizers import ByteTokenizer
from deployments.policy import fixed
from deployments.relay.answer import RelayedAnswer
from deployments.relay.copies import Copies
from deployments.relay.directory import Directory
from deployments.relay.forward import Forward
from deployments.relay.frames import Frame, Kind
from deployments.relay.heads import ResponseHead
from deployments.relay.port import Address, ReplicaPort
from deployments.relay.token_notes import TokenNotation
from deployments.restarts import RestartLimit
from deployments.streams import Streams
from deployments.supervisor import State, Supervisor

TEXT = "One 😀 two 👩‍👩‍👧, drei äöü – 你好 क्षि; stop it. "


@asynccontextmanager
async def replica(ladder: Ladder, saying: Saying, name: str = "r") -> AsyncIterator[Address]:
    """What `Replica` builds with `recovery.survive_replica`."""
    streams = Streams()
    copies = Copies(TokenNotation(), streams.on_step)
    supervisor = Supervisor(
        ladder(0)[0], fixed(ladder), RestartLimit(max_restarts=0, window_s=600.0)
    )
    keeper = Keeper(
        "fake", SayingEngine(saying), supervisor,
        on_step=copies.on_step, on_give_up=streams.on_give_up,
    )  # fmt: skip
    streams.attach(copies.above(keeper))
    app = build_openai_app(
        "fake", streams, keeper, ByteTokenizer(), lambda: 2048, wait_s=5.0, max_waiting=8
    )
    await keeper.start()
    port = ReplicaPort(
        app, replica=name, has_given_up=lambda: keeper.state is State.FAILED, beat_s=0.02
    )
    try:
        yield await port.open("127.0.0.1")
    finally:
        await port.close()
        await keeper.stop()


class Mortal:
    """A replica that dies after so many bytes of its answer, also in the middle of a frame."""

    def __init__(self, behind: Address, *, after_bytes: int) -> None:
        self._behind = behind
        self._left_bytes = after_bytes
        self._tasks: list[asyncio.Task[None]] = []

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.append(asyncio.create_task(self._pass_on(reader, writer)))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_replica, to_replica = await asyncio.open_connection(
            self._behind.host, self._behind.port
        )
        asking = asyncio.create_task(_pump(reader, to_replica))
        with suppress(OSError):
            while self._left_bytes and (data := await from_replica.read(self._left_bytes)):
                self._left_bytes -= len(data)
                writer.write(data)
                await writer.drain()
            writer.close()
        to_replica.transport.abort()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Address]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            yield Address("mortal", "127.0.0.1", port, self._behind.secret)
        finally:
            server.close()
            await asyncio.gather(*self._tasks)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)


class InTurn(Directory):
    """The next replica comes up when the one before is lost."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        super().__init__("fake")
        self._later = list(addresses)
        self.update([self._later.pop(0)])

    def suspect(self, address: Address) -> None:
        super().suspect(address)
        if self._later:
            self.update([self._later.pop(0)])


def relay_of(directory: Directory, *, wait_s: float = 5.0, silence_s: float = 5.0) -> Forward:
    return Forward("fake", directory, wait_s=wait_s, silence_s=silence_s)


async def asked(relay: Forward, path: str, body: dict[str, Any]) -> httpx.Response:
    transport = httpx.ASGITransport(app=relay)
    async with httpx.AsyncClient(transport=transport, base_url="http://relay") as client:
        return await client.post(path, json={"model": "fake", **body})


def heard(answer: httpx.Response) -> Any:
    """All that a client knows of an answer, without how its events were cut."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        whole = answer.json()
        return answer.status_code, _rounded({**whole, "id": None, "created": None})
    *events, last = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert last == "[DONE]", answer.text
    names, choices, usage = set(), {}, None
    for event in map(json.loads, events):
        assert "error" not in event, event
        names.add((event["id"], event["created"]))
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            known = choices.setdefault(choice["index"], {"text": "", "logprobs": [], "roles": 0})
            assert "ended" not in known, "events behind the end"
            delta = choice.get("delta", {})
            known["text"] += choice.get("text", delta.get("content") or "")
            known["roles"] += bool(delta.get("role"))
            for name in ("reasoning", "reasoning_content"):  # vLLM 0.26 has both
                known[name] = known.get(name, "") + (delta.get(name) or "")
            for call in delta.get("tool_calls") or ():
                tool = known.setdefault("tools", {}).setdefault(call["index"], ["", "", 0])
                tool[0] += call["function"].get("name") or ""
                tool[1] += call["function"].get("arguments") or ""
                tool[2] += bool(call.get("id"))
            logprobs = choice.get("logprobs") or {}
            known["logprobs"] += logprobs.get("content") or list(
                zip(*(logprobs[key] for key in ("tokens", "token_logprobs", "text_offset")),
                    strict=True)
                if logprobs else ()
            )  # fmt: skip
            if choice["finish_reason"]:
                known["ended"] = choice["finish_reason"]
    assert len(names) == 1, names
    return _rounded((choices, usage))


def _rounded(value: Any) -> Any:
    """An engine computes the last digits otherwise in another batch."""
    match value:
        case float():
            return round(value, 3)
        case dict():
            return {key: _rounded(item) for key, item in value.items()}
        case list() | tuple():
            return [_rounded(item) for item in value]
    return value


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    is_chat, stream = draw(st.booleans()), draw(st.booleans())
    body: dict[str, Any] = {
        "stream": stream,
        "n": draw(st.integers(1, 3)),
        "max_tokens": draw(st.integers(1, 160)),
        "stop": draw(st.lists(st.sampled_from(["two", "😀 t", "stop", "你好 ", "zz"]), max_size=2)),
        "min_tokens": draw(st.sampled_from([0, 1])),
    }
    if stream:
        body["stream_options"] = {"include_usage": draw(st.booleans())}
    if draw(st.booleans()):
        body |= {"logprobs": True, "top_logprobs": 1} if is_chat else {"logprobs": 1}
    if is_chat:
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": "hi"}]}
    return "/v1/completions", {**body, "prompt": "hi"}


@settings(
    deadline=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    asking=bodies(),
    deaths=st.lists(st.integers(0, 4000), max_size=4),
    step_tokens=st.integers(1, 5),
)
def test_a_client_hears_the_same_whenever_its_replicas_die(
    ladder: Ladder, asking: tuple[str, dict[str, Any]], deaths: list[int], step_tokens: int
) -> None:
    path, body = asking

    async def run() -> tuple[Any, Any]:
        async with AsyncExitStack() as stack:
            saying = Saying(TEXT, step_tokens)
            real = await stack.enter_async_context(replica(ladder, saying))
            mortals = [
                await stack.enter_async_context(Mortal(real, after_bytes=death).listening())
                for death in deaths
            ]
            undisturbed = await asked(relay_of(InTurn([real])), path, body)
            disturbed = await asked(relay_of(InTurn([*mortals, real])), path, body)
            return heard(undisturbed), heard(disturbed)

    undisturbed, disturbed = asyncio.run(run())
    assert disturbed == undisturbed


def test_a_stream_whose_replica_dies_behind_its_last_event_ends_once() -> None:
    head = ResponseHead(status=200, headers=(("content-type", "text/event-stream"),))
    choice = {"index": 0, "text": "hi", "finish_reason": "stop"}
    events = b"data: %b\n\ndata: [DONE]\n\n" % json.dumps({"choices": [choice]}).encode()
    answer, heard = RelayedAnswer("/v1/completions"), b""
    for last in (Kind.NOTES, Kind.END):  # the first replica does not come to its end
        assert answer.begin() is None
        for kind, payload in ((Kind.HEAD, head.encoded()), (Kind.BODY, events), (last, b"")):
            messages = answer.hear(Frame(kind, payload))
            heard += b"".join(message.get("body", b"") for message in messages)
    assert answer.is_done
    assert heard == events


async def test_the_engine_goes_on_behind_the_last_token_and_does_not_begin_again(
    ladder: Ladder,
) -> None:
    body = {"prompt": "hi", "max_tokens": 60, "stream": True}
    async with (
        replica(ladder, Saying("abcdefghij" * 8)) as first,
        replica(ladder, Saying("ABCDEFGHIJ" * 8)) as second,
        Mortal(first, after_bytes=4000).listening() as mortal,
    ):
        choices, _ = await _texts(InTurn([mortal, second]), body)
    text = choices[0]["text"]
    seam = next(number for number, letter in enumerate(text) if letter.isupper())
    assert seam > 5
    assert text == ("abcdefghij" * 8)[:seam] + ("ABCDEFGHIJ" * 8)[seam:60]


async def _texts(directory: Directory, body: dict[str, Any]) -> Any:
    return heard(await asked(relay_of(directory), "/v1/completions", body))


async def test_an_answer_that_was_replayed_before_its_head_says_so(ladder: Ladder) -> None:
    async with (
        replica(ladder, Saying(TEXT)) as real,
        Mortal(real, after_bytes=0).listening() as mortal,
    ):
        quiet = await asked(relay_of(InTurn([real])), "/v1/completions", {"prompt": "hi"})
        replayed = await asked(
            relay_of(InTurn([mortal, real])), "/v1/completions", {"prompt": "hi"}
        )
    assert "x-ballast-replayed" not in quiet.headers
    assert replayed.headers["x-ballast-replayed"] == "1"


async def test_a_silent_replica_is_given_up_and_another_one_asked(ladder: Ladder) -> None:
    async def stay_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(stay_silent, "127.0.0.1", 0)
    async with silent, replica(ladder, Saying(TEXT)) as real:
        port = silent.sockets[0].getsockname()[1]
        stuck = Address("stuck", "127.0.0.1", port, b"")
        relay = relay_of(InTurn([stuck, real]), silence_s=0.5)
        answer = await asked(relay, "/v1/completions", {"prompt": "hi"})
        assert answer.status_code == 200
        assert relay.num_resumed == 1


async def test_a_slow_replica_that_beats_is_not_given_up(ladder: Ladder) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1.2)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    port = ReplicaPort(slow, replica="r", has_given_up=lambda: False, beat_s=0.01)
    relay = relay_of(InTurn([await port.open("127.0.0.1")]), silence_s=0.6)
    answer = await asked(relay, "/v1/completions", {"prompt": "hi"})
    await port.close()
    assert (answer.content, relay.num_resumed) == (b"{}", 0)


async def test_without_a_replica_a_request_is_refused_after_the_bounded_wait() -> None:
    directory = Directory("fake")
    answer = await asked(relay_of(directory, wait_s=0.05), "/v1/completions", {"prompt": "hi"})
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert "recovery.wait_s" in answer.json()["error"]["message"]


async def test_a_stream_that_finds_no_other_replica_ends_with_an_error_event(
    ladder: Ladder,
) -> None:
    body = {"prompt": "hi", "max_tokens": 100, "stream": True}
    async with (
        replica(ladder, Saying(TEXT)) as real,
        Mortal(real, after_bytes=3000).listening() as mortal,
    ):
        relay = relay_of(InTurn([mortal]), wait_s=0.05)
        answer = await asked(relay, "/v1/completions", body)
    *_, last = [line for line in answer.text.split("\n\n") if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_busy"


async def test_a_stream_of_another_endpoint_ends_with_an_error_event() -> None:
    async def dying(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        raise ConnectionAbortedError

    port = ReplicaPort(dying, replica="r", has_given_up=lambda: False)
    relay = relay_of(InTurn([await port.open("127.0.0.1")]))
    answer = await asked(relay, "/v1/responses", {})
    await port.close()
    *_, last = [line for line in answer.text.split("\n\n") if line]
    assert "can't be continued" in json.loads(last.removeprefix("data: "))["error"]["message"]


async def test_a_request_that_its_replicas_die_of_is_given_up(ladder: Ladder) -> None:
    async with AsyncExitStack() as stack:
        real = await stack.enter_async_context(replica(ladder, Saying(TEXT)))
        mortals = [
            await stack.enter_async_context(Mortal(real, after_bytes=0).listening())
            for _ in range(20)
        ]
        answer = await asked(relay_of(InTurn(mortals)), "/v1/completions", {"prompt": "hi"})
    assert answer.status_code == 503
    assert "replicas in a row" in answer.json()["error"]["message"]


async def test_a_replica_that_has_given_up_leaves_its_requests_to_another_one(
    ladder: Ladder,
) -> None:
    body = {"prompt": "hi", "max_tokens": 60, "stream": True}
    dying = Saying(TEXT, deaths=(5, *[0] * 20))
    async with replica(ladder, dying) as first, replica(ladder, Saying(TEXT)) as second:
        choices, _ = await _texts(InTurn([first, second]), body)
    assert choices[0]["text"].startswith("One 😀 two")
    assert choices[0]["ended"] == "length"


async def test_a_client_that_leaves_aborts_its_request_in_the_replica(ladder: Ladder) -> None:
    async with replica(ladder, Saying("x" * 1900)) as real:
        directory = InTurn([real])
        async with listening(relay_of(directory)) as url, httpx.AsyncClient() as client:
            body = {"model": "fake", "prompt": "hi", "stream": True, "max_tokens": 1900}
            async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                await anext(answer.aiter_raw())
            await until(lambda: not directory._num_open)


async def test_nobody_gets_an_answer_without_the_secret() -> None:
    asked_for = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal asked_for
        asked_for += 1

    port = ReplicaPort(app, replica="r", has_given_up=lambda: False)
    address = await port.open("127.0.0.1")
    wrong = Address(address.replica, address.host, address.port, b"guess")
    answer = await asked(relay_of(InTurn([wrong]), wait_s=0.05), "/v1/completions", {})
    await port.close()
    assert (answer.status_code, asked_for) == (503, 0)
    assert address.secret.hex() not in repr(address)
    assert repr(address.secret) not in repr(address)


async def test_a_mistake_of_the_application_is_not_tried_on_every_replica() -> None:
    async def wrong(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("a bug")

    port = ReplicaPort(wrong, replica="r", has_given_up=lambda: False)
    relay = relay_of(InTurn([await port.open("127.0.0.1")]))
    answer = await asked(relay, "/v1/completions", {"prompt": "hi"})
    await port.close()
    assert (answer.status_code, relay.num_resumed) == (500, 0)


async def test_an_application_may_listen_again_before_its_last_listener_is_gone() -> None:
    """As vLLM's: one listens while an answer is prepared, and Starlette's next while it streams."""

    async def listening_twice(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.request"
        listeners = [asyncio.create_task(receive()) for _ in range(2)]
        await asyncio.sleep(0)
        listeners[0].cancel()
        listeners.append(asyncio.create_task(receive()))
        await asyncio.wait(listeners, timeout=0.05)
        assert [listener.done() for listener in listeners] == [True, False, False]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})
        for listener in listeners:
            listener.cancel()

    port = ReplicaPort(listening_twice, replica="r", has_given_up=lambda: False)
    relay = relay_of(InTurn([await port.open("127.0.0.1")]))
    answer = await asked(relay, "/v1/completions", {"prompt": "hi"})
    await port.close()
    assert (answer.status_code, relay.num_resumed) == (200, 0)
