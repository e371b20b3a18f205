"""Which prompts are prepared in vLLM's thread."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from scripted_vllm import Front, build_marked_model
from test_openai_harness import Ladder, client_of
from test_saying_engine import Saying

from deployments.engines.vllm_prompts import SHORT_CHARACTERS

# No engine is started, but all of vLLM is imported. It calls what it has itself deprecated.
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.asyncio(loop_scope="module"),  # AsyncLLM stays on the loop of its first request
]

SHORT = "Tell me a story."
LONG = "word " * (SHORT_CHARACTERS // 5) + "more"
TOOL = {"type": "function", "function": {"name": "f", "description": LONG, "parameters": {}}}


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder: Path = tmp_path_factory.mktemp("marked")
    build_marked_model(folder)
    front = Front(folder)
    yield front
    front.close()


def chat(text: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **more}


def completion(text: str) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": text}


@pytest.mark.parametrize(
    ("call", "text", "num_in_thread"),
    [
        (completion(SHORT), SHORT, 0),
        (completion(LONG), LONG, 1),
        (chat(SHORT), f"<|im_start|>user\n{SHORT}<|im_end|>\n<|im_start|>assistant\n", 0),
        # Rendered there, and what comes out is tokenized there.
        (chat(LONG), f"<|im_start|>user\n{LONG}<|im_end|>\n<|im_start|>assistant\n", 2),
        (chat(SHORT, tools=[TOOL], tool_choice="none"), None, 1),
    ],
    ids=["short prompt", "long prompt", "short chat", "long chat", "long tool"],
)
async def test_a_thread_is_asked_for_what_is_long(
    front: Front,
    ladder: Ladder,
    monkeypatch: pytest.MonkeyPatch,
    call: tuple[str, dict[str, Any]],
    text: str | None,
    num_in_thread: int,
) -> None:
    path, body = call
    executor = front._llm.renderer._executor
    submitted: list[object] = []
    submit = executor.submit

    def counted(job: Any, *args: Any) -> Any:
        submitted.append(job)
        return submit(job, *args)

    monkeypatch.setattr(executor, "submit", counted)
    async with front.over(ladder, Saying("Yes.")) as (engine, app), client_of(app) as client:
        answer = await client.post(path, json={"model": "fake", "max_tokens": 9, **body})
        assert answer.status_code == 200, answer.text
        [entered] = engine.entered
    assert len(submitted) == num_in_thread
    if text is not None:
        assert entered.prompt_token_ids == list(front.tokens_of(text))
