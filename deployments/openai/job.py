"""One HTTP request in tokens, checked against the context. Knows neither HTTP nor text."""

from collections.abc import Sequence
from dataclasses import dataclass

from deployments.engines.protocol import Sampling, TokenRequest
from deployments.openai.errors import RequestError
from deployments.openai.requests import MAX_PROMPTS, SMALLEST_TEMPERATURE, GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A `TokenRequest` for each choice of the answer, in the order of their indices."""

    job_id: str
    requests: tuple[TokenRequest, ...]
    stops: tuple[str, ...]
    num_prompt_tokens: int  # each prompt once, however many answers it gets


def make_job(
    job_id: str,
    asked: GenerationRequest,
    prompts: Sequence[tuple[int, ...]],
    *,
    prompt_field: str,
    context_tokens: int,
) -> Job:
    """Raises `RequestError` for what the context can't hold."""
    num_choices = asked.n or 1
    if len(prompts) * num_choices > MAX_PROMPTS:
        raise RequestError(
            f"n: {len(prompts)} prompts times {num_choices} choices are more than {MAX_PROMPTS}",
            "n",
        )
    requests: list[TokenRequest] = []
    for prompt in prompts:
        max_tokens = _max_tokens(asked, len(prompt), prompt_field, context_tokens)
        for choice in range(num_choices):
            requests.append(
                TokenRequest(
                    request_id=f"{job_id}-{len(requests)}",
                    prompt_token_ids=prompt,
                    sampling=_sampling(asked, max_tokens, choice),
                )
            )
    return Job(
        job_id=job_id,
        requests=tuple(requests),
        stops=asked.stop,
        num_prompt_tokens=sum(map(len, prompts)),
    )


def _max_tokens(
    asked: GenerationRequest, num_prompt_tokens: int, prompt_field: str, context_tokens: int
) -> int:
    if num_prompt_tokens == 0:
        raise RequestError(f"{prompt_field}: no tokens", prompt_field)
    left = context_tokens - num_prompt_tokens
    if left < 1:
        raise RequestError(
            f"{prompt_field}: {num_prompt_tokens} tokens, but this model's context holds "
            f"{context_tokens} tokens, the answer's among them",
            prompt_field,
            "context_length_exceeded",
        )
    field, max_tokens = asked.asked_max_tokens
    if max_tokens is None:
        return min(asked.default_max_tokens or left, left)
    if not 1 <= max_tokens <= left:
        raise RequestError(
            f"{field}: {max_tokens} is not between 1 and {left}: this model's context holds "
            f"{context_tokens} tokens and the prompt takes {num_prompt_tokens} of them",
            field,
            "context_length_exceeded" if max_tokens > left else None,
        )
    return max_tokens


def _sampling(asked: GenerationRequest, max_tokens: int, choice: int) -> Sampling:
    min_tokens = asked.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens: {min_tokens} is more than the {max_tokens} tokens of the answer",
            "min_tokens",
        )
    temperature = 1.0 if asked.temperature is None else asked.temperature
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        # As vLLM: almost zero is greedy, and below 0.01 the logits would overflow.
        temperature=0.0 if temperature < SMALLEST_TEMPERATURE else max(temperature, 0.01),
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(asked.top_k or 0, 0),
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        repetition_penalty=asked.repetition_penalty or 1.0,
        # Different from choice to choice, as in vLLM: n equal answers would be no use.
        seed=None if asked.seed is None else asked.seed + choice,
        logprobs=asked.num_logprobs,
        ignore_eos=bool(asked.ignore_eos),
    )
