"""One request of a batch: its tokens so far, and how the next one is chosen from the logits."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deployments.engines.protocol import TokenDelta, TokenLogprob, TokenRequest

GREEDY_BELOW = 1e-5  # a temperature under this is 0, as in vLLM


@dataclass(slots=True, kw_only=True, eq=False)
class TokenSequence:
    """One request and its output so far, the part from before a replay included."""

    request: TokenRequest
    output: list[int]
    processors: LogitsProcessorList
    generator: torch.Generator | None
    finish_reason: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.output)

    @property
    def token_ids(self) -> list[int]:
        return [*self.request.prompt_token_ids, *self.output]

    @property
    def is_sampled(self) -> bool:
        return self.request.sampling.temperature >= GREEDY_BELOW


@dataclass(frozen=True, slots=True, kw_only=True)
class _OutputPenalty:
    """OpenAI's presence and frequency penalties: over what was generated, not over the prompt."""

    prompt_tokens: int
    presence: float
    frequency: float

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        output = input_ids[:, self.prompt_tokens :]
        counts = torch.zeros_like(scores)
        counts.scatter_add_(1, output, torch.ones_like(output, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


def eos_token_ids_of(model: Any) -> frozenset[int]:
    """What `generate()` would stop at."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    return frozenset(() if eos is None else [eos] if isinstance(eos, int) else eos)


def processors_of(
    request: TokenRequest, eos_token_ids: frozenset[int], device: torch.device
) -> LogitsProcessorList:
    """In vLLM's order; the repetition penalty counts the prompt too, in both libraries."""
    sampling, prompt_tokens = request.sampling, len(request.prompt_token_ids)
    presence, frequency = sampling.presence_penalty, sampling.frequency_penalty
    chain = LogitsProcessorList()
    if sampling.min_tokens and eos_token_ids and not sampling.ignore_eos:
        eos = sorted(eos_token_ids)
        chain.append(
            MinNewTokensLengthLogitsProcessor(prompt_tokens, sampling.min_tokens, eos, device)
        )
    if sampling.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if presence or frequency:
        chain.append(
            _OutputPenalty(prompt_tokens=prompt_tokens, presence=presence, frequency=frequency)
        )
    if sampling.temperature < GREEDY_BELOW:
        return chain
    if sampling.temperature != 1.0:
        chain.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        chain.append(TopPLogitsWarper(sampling.top_p))
    return chain


def choose(sequence: TokenSequence, logits: torch.Tensor) -> torch.Tensor:
    """The next token of one row, by the sequence's own sampling."""
    scores = logits
    if sequence.processors:
        token_ids = torch.tensor([sequence.token_ids], device=logits.device)
        scores = sequence.processors(token_ids, logits)
    if not sequence.is_sampled:
        return scores.argmax()
    if sequence.generator is not None:
        sequence.generator.manual_seed(_seed_of_token(sequence))
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=sequence.generator)[0, 0]


def _seed_of_token(sequence: TokenSequence) -> int:
    """From the request's seed and the token's place, so that a replay draws what was drawn."""
    words = f"{sequence.request.sampling.seed}:{len(sequence.output)}".encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=4).digest())  # the CPU reads 32 bits


def delta_of(
    sequence: TokenSequence, token: int | None = None, logits: torch.Tensor | None = None
) -> TokenDelta:
    logprobs: tuple[TokenLogprob, ...] = ()
    num_top = sequence.request.sampling.logprobs
    if num_top is not None and token is not None and logits is not None:
        logprobs = (_logprob(token, logits, num_top),)
    return TokenDelta(
        request_id=sequence.request.request_id,
        new_token_ids=() if token is None else (token,),
        logprobs=logprobs,
        finish_reason=sequence.finish_reason,
    )


def _logprob(token: int, logits: torch.Tensor, num_top: int) -> TokenLogprob:
    """What the model itself said, before penalties and temperature, as vLLM reports it."""
    all_logprobs = logits.log_softmax(dim=-1)
    top = all_logprobs.topk(min(num_top, logits.shape[-1]))
    return TokenLogprob(
        token_id=token,
        logprob=all_logprobs[token].item(),
        top=tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )
