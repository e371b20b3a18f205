"""Hands vLLM's OpenAI layer each delta as the engine gave it, where the cuts between them count.

vLLM joins the deltas that a reader is late for, and its parsers of reasoning and tool calls do not
answer the same for every cut: of `<think>` in one delta with what follows, deepseek_r1 makes a part
of the reasoning. An answer that is told again would be one delta. Knows nothing of seams.
"""

import asyncio
from argparse import Namespace
from collections import deque
from typing import Any


def has_parsers(args: Namespace) -> bool:
    """Whether something in the front reads more than text out of the deltas."""
    return bool(args.tool_call_parser or args.structured_outputs_config.reasoning_parser)


def keep_apart() -> None:
    """From here on, for every request of this process's front."""
    from vllm.v1.engine import async_llm
    from vllm.v1.engine.output_processor import RequestOutputCollector

    class Apart(RequestOutputCollector):
        """A queue, in which vLLM has room for one."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._later: deque[Any] = deque()

        def put(self, output: Any) -> None:
            if isinstance(output, Exception):
                self._later.clear()
            if self.aggregate and self.output is not None and not isinstance(output, Exception):
                self._later.append(output)
            else:
                super().put(output)

        async def get(self) -> Any:
            output = await super().get()
            if self._later:
                super().put(self._later.popleft())
                await asyncio.sleep(0)  # a long answer told again is not all that there is to do
            return output

        def get_nowait(self) -> None:
            """Let the reader wait for `get`."""

    async_llm.RequestOutputCollector = Apart  # type: ignore[misc]
