"""Short prompts are prepared where they arrive instead of in a thread.

vLLM tokenizes in a thread, and renders chat templates there, so that a long prompt does not stop
the streams. For a short one the way there and back takes longer than the work: the thread has to
wake up and to get Python's lock twice, and a busy event loop gives it up every 5 ms only.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

# They take 0.3 to 0.5 ms on a slow core, with the demo model's tokenizer.
SHORT_CHARACTERS = 1000


def prepare_short_ones_here(llm: "AsyncLLM") -> None:
    """Where several threads may use the tokenizer at once, which vLLM sees to for most models."""
    from vllm.renderers.hf import HfRenderer, safe_apply_chat_template
    from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin

    renderer: Any = llm.renderer
    is_safe = isinstance(renderer.tokenizer, ThreadSafeHFTokenizerMixin)
    if type(renderer) is not HfRenderer or not is_safe:
        return
    renderer._tokenize_prompt_async = _here_if(
        _is_short_prompt, renderer._tokenize_prompt, renderer._tokenize_prompt_async
    )
    renderer._apply_chat_template_async = _here_if(
        _is_short_chat, safe_apply_chat_template, renderer._apply_chat_template_async
    )


def _here_if(
    is_short: Callable[..., bool],
    here: Callable[..., Any],
    in_thread: Callable[..., Awaitable[Any]],
) -> Callable[..., Awaitable[Any]]:
    async def prepare(*args: Any, **options: Any) -> Any:
        if is_short(*args, **options):
            return here(*args, **options)
        return await in_thread(*args, **options)

    return prepare


def _is_short_prompt(prompt: Any, params: Any) -> bool:
    return len(prompt["prompt"]) <= SHORT_CHARACTERS


def _is_short_chat(
    model_config: Any, tokenizer: Any, conversation: Any, *, tools: Any = None, **options: Any
) -> bool:
    return len(str(conversation)) + len(str(tools)) <= SHORT_CHARACTERS
