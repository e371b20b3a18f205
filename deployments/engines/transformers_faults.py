"""Faults of the `transformers` engine: a batch that dies as the config asks for it."""

import functools
from collections.abc import Sequence
from typing import Any

from deployments.engines.protocol import TokenRequest, TokenStep
from deployments.faults import InBatch, Rehearsal, carry_out


class MortalBatch:
    """A `Batch` with the same face, which looks before each step whether it has to die."""

    def __init__(self, batch: Any, rehearsal: Rehearsal, model_path: str) -> None:
        self._batch = batch
        self._rehearsal = rehearsal
        self._model_path = model_path
        self._requests: dict[str, InBatch] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """The batch that a fault looks at: one that is due comes before newcomers are let in."""
        return tuple(self._requests)

    def add(self, request: TokenRequest, emitted: Sequence[int] = ()) -> None:
        self._requests[request.request_id] = InBatch(
            prompt=self._text(request) if self._rehearsal.reads_prompts else "",
            is_replayed=bool(emitted),
        )
        self._batch.add(request, emitted)

    def remove(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        self._batch.remove(request_id)

    def step(self) -> TokenStep:
        carry_out(self._rehearsal.stepping(list(self._requests.values())))
        step: TokenStep = self._batch.step()
        self._rehearsal.generated(sum(len(delta.new_token_ids) for delta in step.outputs))
        for delta in step.outputs:
            if delta.finished:
                self._requests.pop(delta.request_id, None)
        return step

    def _text(self, request: TokenRequest) -> str:
        return str(_tokenizer(self._model_path).decode(request.prompt_token_ids))


@functools.cache
def _tokenizer(model_path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)
