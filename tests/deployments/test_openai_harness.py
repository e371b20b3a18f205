"""What the tests of the OpenAI layer share: a model served by the fake engine. Has no tests."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from deployments.engines.fake import FakeEngine, Script, next_token
from deployments.engines.protocol import Listener, Sampling, TokenRequest
from deployments.faults import Fault
from deployments.keeper import Keeper
from deployments.openai.app import build_openai_app
from deployments.openai.tokenizers import ByteTokenizer, Tokenizer
from deployments.policy import fixed
from deployments.restarts import RestartLimit
from deployments.streams import Streams
from deployments.supervisor import Supervisor
from vram.ladder import Rung
from vram.settings import EngineSettings

Ladder = Callable[[int], tuple[Rung, ...]]
FAST = Script(step_s=0)
CONTEXT_TOKENS = 2048


def answer_of(prompt: str, num_tokens: int) -> str:
    """What the fake engine says, undisturbed."""
    tokens = list(prompt.encode())
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return bytes(tokens[len(prompt.encode()) :]).decode()


def token_request(name: str, prompt: str = "hello", max_tokens: int = 20) -> TokenRequest:
    return TokenRequest(
        request_id=name,
        prompt_token_ids=tuple(prompt.encode()),
        sampling=Sampling(max_tokens=max_tokens),
    )


class GatedEngine(FakeEngine):
    """Dies after three tokens; its later lives begin, or fail, when `gate` is set."""

    def __init__(self, *later: Fault) -> None:
        super().__init__(Script(step_s=0, faults=(Fault(life=1, after_tokens=3), *later)))
        self.gate = asyncio.Event()

    async def start(self, settings: EngineSettings, listener: Listener) -> None:
        if self.lives:
            await self.gate.wait()
        await super().start(settings, listener)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    engine: FakeEngine
    keeper: Keeper[TokenRequest]
    streams: Streams
    app: FastAPI

    @property
    def is_idle(self) -> bool:
        """No slot taken, nothing to replay, nobody waiting."""
        return not (self.engine.num_running or len(self.keeper.journal) or len(self.streams))

    def client(self) -> httpx.AsyncClient:
        return client_of(self.app)


@asynccontextmanager
async def serving(
    ladder: Ladder,
    script: Script = FAST,
    *,
    engine: FakeEngine | None = None,
    tokenizer: Tokenizer | None = None,
    wait_s: float = 5.0,
    max_waiting: int = 8,
    starts: bool = True,
    max_restarts: int = 2,
) -> AsyncIterator[Served]:
    engine = engine or FakeEngine(script)
    streams = Streams()
    supervisor = Supervisor(
        ladder(0)[0], fixed(ladder), RestartLimit(max_restarts=max_restarts, window_s=600.0)
    )
    keeper = Keeper(
        "fake",
        engine,
        supervisor,
        on_step=streams.on_step,
        on_give_up=streams.on_give_up,
        on_refusal=streams.on_refusal,
    )
    streams.attach(keeper)
    app = build_openai_app(
        "fake",
        streams,
        keeper,
        tokenizer or ByteTokenizer(),
        lambda: supervisor.rung.settings.max_model_len,
        wait_s=wait_s,
        max_waiting=max_waiting,
    )
    if starts:
        await keeper.start()
    try:
        yield Served(engine=engine, keeper=keeper, streams=streams, app=app)
    finally:
        await keeper.stop()


def client_of(app: ASGIApp) -> httpx.AsyncClient:
    # An error of the application's own fails the test instead of becoming a 500.
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://ballast")


@asynccontextmanager
async def listening(app: ASGIApp, *, send_buffer_bytes: int | None = None) -> AsyncIterator[str]:
    """On a real port, for what only a connection can show: streaming and leaving."""
    server = _Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    )
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    listener = server.servers[0].sockets[0]
    port = listener.getsockname()[1]
    if send_buffer_bytes is not None:  # connections take it over; the kernel's own hold megabytes
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


def texts_of(events: Sequence[dict[str, Any]]) -> dict[int, str]:
    """What each choice of a stream said."""
    texts: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + text
    return texts


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # pytest keeps its own
