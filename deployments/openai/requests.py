"""What clients send: OpenAI's request bodies, their types and ranges. Knows no model and no engine.

Types are strict: "0.7" is not a number. Fields that would change the answer in a way that this
layer can't give are refused by name; all others that it does not know are ignored, as vLLM does.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from deployments.openai.errors import RequestError

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_PROMPTS = 1024  # as vLLM's VLLM_MAX_COMPLETION_PROMPTS
COMPLETION_MAX_TOKENS = 16  # of /v1/completions, when nothing is asked: OpenAI's and vLLM's number
SMALLEST_TEMPERATURE = 1e-5  # below: greedy, as in vLLM

Prompt = str | tuple[int, ...]


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """Written by hand: a union of list types would report each wrong item of a 8 MB list."""
    match value:
        case str():
            return (value,)
        case [*items] if items and {*map(type, items)} == {int}:
            return (tuple(items),)
        case [*items] if items and {*map(type, items)} == {str}:
            return tuple(items)
        case [*items] if items and all(
            type(item) is list and item and {*map(type, item)} == {int} for item in items
        ):
            return tuple(map(tuple, items))
    raise PydanticCustomError(
        "prompt", "a string, a list of strings, a list of token ids or a list of such lists"
    )


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    match stops:
        case None:
            return ()
        case [*items] if len(items) <= MAX_STOPS and all(
            isinstance(item, str) and 0 < len(item) <= MAX_STOP_CHARS for item in items
        ):
            return tuple(items)
    raise PydanticCustomError(
        "stop",
        f"a string of 1 to {MAX_STOP_CHARS} characters, or a list of at most {MAX_STOPS} of them",
    )


def _text_of(content: Any) -> Any:
    """A message's parts as one text, as vLLM joins them for templates that expect a string."""
    if not isinstance(content, list):
        return content
    for number, part in enumerate(content):
        if not (
            isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
        ):
            raise PydanticCustomError(
                "content", f"part {number} is not a text; this engine takes text"
            )
    return "\n".join(part["text"] for part in content)


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str | None, BeforeValidator(_text_of)] = None


class StreamOptions(_Body):
    include_usage: bool | None = None


class GenerationRequest(_Body):
    """What both kinds of request have."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] = ()
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def asked_max_tokens(self) -> tuple[str, int | None]:
        """With the name of the field that asks for it."""
        return "max_tokens", self.max_tokens

    @property
    def default_max_tokens(self) -> int | None:
        """None: as many as the context leaves."""
        return None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives for each token; None: no log probabilities at all."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_together(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise _about("stream_options", "only with stream: true")
        for name, value in (self.model_extra or {}).items():
            if name in REFUSED and value is not None and value not in REFUSED[name].harmless:
                raise _about(name, REFUSED[name].reason)
        return self


class CompletionRequest(GenerationRequest):
    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_prompts)]
    max_tokens: int | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None

    @property
    def default_max_tokens(self) -> int | None:
        return COMPLETION_MAX_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _check_completion(self) -> "CompletionRequest":
        if len(self.prompt) > MAX_PROMPTS:
            raise _about("prompt", f"{len(self.prompt)} prompts; at most {MAX_PROMPTS}")
        if self.echo and self.logprobs is not None:
            raise _about("echo", "not together with logprobs: " + _VLLM_CAN)
        return self


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def asked_max_tokens(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise _about("top_logprobs", "only with logprobs: true")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class _Refusal:
    """Of a field that we know and can't honour; `harmless` values of it ask for nothing."""

    reason: str
    harmless: tuple[Any, ...] = ()


_VLLM_CAN = "this engine can't do that; a model on the engine 'vllm' can"
_NOBODY_CAN = "this server can't do that"
REFUSED = {
    "response_format": _Refusal(reason=_VLLM_CAN, harmless=({"type": "text"},)),
    "tools": _Refusal(reason=_VLLM_CAN, harmless=([],)),
    "tool_choice": _Refusal(reason=_VLLM_CAN, harmless=("none", "auto")),
    "functions": _Refusal(reason=_VLLM_CAN, harmless=([],)),
    "function_call": _Refusal(reason=_VLLM_CAN, harmless=("none", "auto")),
    "logit_bias": _Refusal(reason=_VLLM_CAN, harmless=({},)),
    "min_p": _Refusal(reason=_VLLM_CAN, harmless=(0,)),
    "structured_outputs": _Refusal(reason=_VLLM_CAN),
    "guided_json": _Refusal(reason=_VLLM_CAN),
    "guided_regex": _Refusal(reason=_VLLM_CAN),
    "guided_choice": _Refusal(reason=_VLLM_CAN),
    "guided_grammar": _Refusal(reason=_VLLM_CAN),
    "stop_token_ids": _Refusal(reason=_VLLM_CAN, harmless=([],)),
    "allowed_token_ids": _Refusal(reason=_VLLM_CAN, harmless=([],)),
    "bad_words": _Refusal(reason=_VLLM_CAN, harmless=([],)),
    "include_stop_str_in_output": _Refusal(reason=_VLLM_CAN, harmless=(False,)),
    "skip_special_tokens": _Refusal(reason=_VLLM_CAN, harmless=(True,)),
    "prompt_logprobs": _Refusal(reason=_VLLM_CAN),
    "truncate_prompt_tokens": _Refusal(reason=_VLLM_CAN),
    "use_beam_search": _Refusal(reason=_VLLM_CAN, harmless=(False,)),
    "continue_final_message": _Refusal(reason=_VLLM_CAN, harmless=(False,)),
    "add_generation_prompt": _Refusal(reason=_VLLM_CAN, harmless=(True,)),
    "suffix": _Refusal(reason=_NOBODY_CAN, harmless=("",)),
    "best_of": _Refusal(reason=_NOBODY_CAN, harmless=(1,)),
    "audio": _Refusal(reason=_NOBODY_CAN),
    "modalities": _Refusal(reason=_NOBODY_CAN, harmless=(["text"], [])),
    "web_search_options": _Refusal(reason=_NOBODY_CAN),
}

B = TypeVar("B", bound=BaseModel)


def parse(kind: type[B], body: bytes) -> B:
    """Raises `RequestError` that names the first wrong field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _named(error.errors(include_url=False, include_input=False)[0]) from None


def _named(error: ErrorDetails) -> RequestError:
    match error["type"]:
        case "json_invalid":
            reason = error.get("ctx", {}).get("error", error["msg"])
            return RequestError(f"The body is not valid JSON: {reason}.", code="invalid_json")
        case "model_type" | "model_attributes_type" if not error["loc"]:
            return RequestError("The body has to be a JSON object.", code="invalid_json")
        case "value_about_field":
            param = error["ctx"]["param"]
        case _:
            param = re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, error["loc"])))
    return RequestError(f"{param}: {error['msg']}", param)


def _about(param: str, message: str) -> PydanticCustomError:
    """An error of the whole body that is one field's fault."""
    return PydanticCustomError(
        "value_about_field", "{message}", {"param": param, "message": message}
    )
