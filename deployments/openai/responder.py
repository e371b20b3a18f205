"""Carries a checked request to its last byte: tokens, admission, engine, text, wire."""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from openai.types import CompletionUsage
from starlette.types import Send

from deployments.errors import BallastError
from deployments.openai.answer import AnswerWriter
from deployments.openai.chat_answer import ChatWriter
from deployments.openai.choice import Choices
from deployments.openai.completion_answer import CompletionWriter
from deployments.openai.errors import RequestError, UnknownModel, answer_to
from deployments.openai.job import Job, make_job
from deployments.openai.requests import ChatRequest, CompletionRequest, GenerationRequest, Prompt
from deployments.openai.tokenizers import MAX_INLINE_CHARS, Tokenizer
from deployments.openai.wire import DONE, EventStream, event, send_json
from deployments.streams import Streams

T = TypeVar("T")


class Gate(Protocol):
    """What is needed of a `Keeper` before a request is taken on."""

    async def admission(self, *, wait_s: float, max_waiting: int) -> None: ...


class Responder:
    """Answers for one model. Every error before the first byte is raised; see `answer_to`."""

    def __init__(
        self,
        model: str,
        streams: Streams,
        gate: Gate,
        tokenizer: Tokenizer,
        max_model_len: Callable[[], int],
        *,
        wait_s: float,
        max_waiting: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.model = model
        self._streams = streams
        self._gate = gate
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._wait_s = wait_s
        self._max_waiting = max_waiting
        self._clock = clock

    async def complete(self, asked: CompletionRequest, send: Send) -> None:
        """POST /v1/completions."""
        self._check_model(asked)
        num_chars = sum(len(prompt) for prompt in asked.prompt if isinstance(prompt, str))
        prompts = await _run(num_chars, lambda: [*map(self._prompt_tokens, asked.prompt)])
        job = await self._admit(f"cmpl-{uuid.uuid4().hex}", asked, prompts, "prompt")
        echoes = [self._prompt_text(prompt) if asked.echo else "" for prompt in asked.prompt]
        writer = CompletionWriter(job.job_id, self.model, self._created_s(), self._tokenizer)
        await self._answer(
            job, asked, writer, [echo for echo in echoes for _ in range(asked.n or 1)], send
        )

    async def chat(self, asked: ChatRequest, send: Send) -> None:
        """POST /v1/chat/completions."""
        self._check_model(asked)
        messages = [message.model_dump(exclude_none=True) for message in asked.messages]
        num_chars = sum(len(message.content or "") for message in asked.messages)
        template_kwargs = asked.chat_template_kwargs or {}
        prompt = await _run(
            num_chars, lambda: self._tokenizer.apply_chat_template(messages, template_kwargs)
        )
        job = await self._admit(f"chatcmpl-{uuid.uuid4().hex}", asked, [tuple(prompt)], "messages")
        writer = ChatWriter(job.job_id, self.model, self._created_s(), self._tokenizer)
        await self._answer(job, asked, writer, [""] * len(job.requests), send)

    async def _admit(
        self,
        job_id: str,
        asked: GenerationRequest,
        prompts: Sequence[tuple[int, ...]],
        prompt_field: str,
    ) -> Job:
        """What is wrong with a request is said at once, whether or not the engine is there."""

        def job_for(context_tokens: int) -> Job:
            return make_job(
                job_id, asked, prompts, prompt_field=prompt_field, context_tokens=context_tokens
            )

        context_tokens = self._max_model_len()
        job = job_for(context_tokens)
        await self._gate.admission(wait_s=self._wait_s, max_waiting=self._max_waiting)
        if self._max_model_len() != context_tokens:  # it came back on a smaller rung
            job = job_for(self._max_model_len())
        return job

    async def _answer(
        self,
        job: Job,
        asked: GenerationRequest,
        writer: AnswerWriter,
        echoes: Sequence[str],
        send: Send,
    ) -> None:
        choices = Choices(job.requests, self._tokenizer, job.stops, echoes)
        if asked.stream:
            events = EventStream(send)
            try:
                await self._stream(job, choices, writer, events)
            except BallastError as error:
                if not events.has_started:
                    raise
                await events.write(event(answer_to(error).body), last=True)
                return
            usage = writer.usage(_usage(job, choices)) if asked.includes_usage else b""
            await events.write(usage + DONE, last=True)
        else:
            await self._collect(job, choices)
            await send_json(send, writer.whole(choices.take_all(), _usage(job, choices)))

    async def _stream(
        self, job: Job, choices: Choices, writer: AnswerWriter, events: EventStream
    ) -> None:
        opening = writer.opening(len(job.requests))
        async with self._streams.open(job.requests) as inbox:
            async for deltas in inbox:
                for request_id in choices.feed(deltas):
                    await inbox.end(request_id)
                await events.write(opening + b"".join(map(writer.piece, choices.take())))
                opening = b""

    async def _collect(self, job: Job, choices: Choices) -> None:
        async with self._streams.open(job.requests) as inbox:
            async for deltas in inbox:
                for request_id in choices.feed(deltas):
                    await inbox.end(request_id)

    def _check_model(self, asked: GenerationRequest) -> None:
        if asked.model is not None and asked.model != self.model:
            raise UnknownModel(asked.model, self.model)

    def _prompt_tokens(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self._tokenizer.encode(prompt))
        if min(prompt) < 0 or max(prompt) >= self._tokenizer.vocabulary_size:
            raise RequestError(
                f"prompt: this model's token ids are 0 to {self._tokenizer.vocabulary_size - 1}",
                "prompt",
            )
        return prompt

    def _prompt_text(self, prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _created_s(self) -> int:
        return int(self._clock())


async def _run(num_chars: int, tokenize: Callable[[], T]) -> T:
    """In a thread where it would stop all other streams: 8 ms for 8000 characters, at worst."""
    return tokenize() if num_chars <= MAX_INLINE_CHARS else await asyncio.to_thread(tokenize)


def _usage(job: Job, choices: Choices) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=job.num_prompt_tokens,
        completion_tokens=choices.num_tokens,
        total_tokens=job.num_prompt_tokens + choices.num_tokens,
    )
