"""Continuous batching of a Hugging Face causal model: who is in the batch and what each says next.

Requests join and leave between steps. The running ones share a cache, padded on the left as
`generate()` pads a batch; newcomers are prefilled beside it and then joined to it.
Knows nothing of Ray, of processes, or of where the model came from.

Why not `transformers.generation.continuous_batching` (5.23): whether to sample is one choice for
all requests, and it has no seeds, penalties, min_tokens or alternative logprobs for one request.
"""

import inspect
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from deployments.engines.protocol import TokenDelta, TokenRequest, TokenStep
from deployments.engines.transformers_rows import Rows
from deployments.engines.transformers_sequence import (
    TokenSequence,
    choose,
    delta_of,
    eos_token_ids_of,
    processors_of,
)

log = structlog.get_logger(__name__)

MIN_BATCHED_TOKENS = 64  # a share of a prompt that is not worth halving any more
PADDING_LIMIT = 1.5  # prompts are prefilled together while padding adds no more than half


@dataclass(frozen=True, slots=True)
class _Mark:
    """Where a request was before a part of a step."""

    sequence: TokenSequence
    num_emitted: int


class Batch:
    """The requests of one model: those waiting, those being prefilled, those running."""

    def __init__(
        self,
        model: Any,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        kv_cache_memory_bytes: int | None = None,
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.num_reliefs = 0
        self._model = model
        self._eos_token_ids = eos_token_ids_of(model)
        self._forward_parameters = inspect.signature(model.forward).parameters
        self._waiting: deque[TokenSequence] = deque()
        self._prefilling: Rows | None = None  # several steps long only for one long prompt
        self._running = Rows(model.config)
        self._token_bytes = self.rehearse(1)
        self._max_cached_tokens = (
            None if kv_cache_memory_bytes is None else kv_cache_memory_bytes // self._token_bytes
        )

    @property
    def num_running(self) -> int:
        return len(self._running.sequences) + (self._prefilling is not None)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running.sequences or self._prefilling)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of the requests that hold memory: those that generate, and those being prefilled."""
        rows = (self._running, *(() if self._prefilling is None else (self._prefilling,)))
        return tuple(each.request.request_id for group in rows for each in group.sequences)

    def add(self, request: TokenRequest, emitted: Sequence[int] = ()) -> None:
        """Queue a request; `emitted` is output that its client has, and counts as output."""
        device, seed = self._model.device, request.sampling.seed
        sequence = TokenSequence(
            request=request,
            output=list(emitted),
            processors=processors_of(request, self._eos_token_ids, device),
            generator=None if seed is None else torch.Generator(device),
        )
        if sequence.num_tokens >= self.max_model_len:
            sequence.finish_reason = "length"
        elif emitted:
            sequence.finish_reason = self._finish_reason(sequence)
        self._waiting.append(sequence)

    def remove(self, request_id: str) -> None:
        """Forget a request and free its rows; an unknown id is nobody's."""

        def is_other(sequence: TokenSequence) -> bool:
            return sequence.request.request_id != request_id

        self._waiting = deque(filter(is_other, self._waiting))
        if self._prefilling and not all(map(is_other, self._prefilling.sequences)):
            self._prefilling = None
        if not all(map(is_other, self._running.sequences)):
            self._running.keep(list(map(is_other, self._running.sequences)))

    def step(self) -> TokenStep:
        """One token for every running request, and the next share of the newcomers' prompts.

        A part of it that does not fit into memory gives nothing, and the next step is a smaller
        one. Raises `torch.OutOfMemoryError` where there is no smaller one.
        """
        deltas: list[TokenDelta] = []
        with torch.inference_mode():
            for part in (self._decode, self._settle_finished, self._admit_and_prefill):
                before, shortage = self._marks(), None
                try:
                    deltas += part()
                except torch.OutOfMemoryError as error:
                    shortage = str(error)  # and not the error, whose traceback holds tensors
                if shortage is not None:
                    self._relieve(before, shortage)
                    break
        return TokenStep(outputs=tuple(deltas))

    def rehearse(self, num_tokens: int) -> int:
        """Prefill this much of nothing, so that what does not fit fails now; bytes a token."""
        rows = Rows(self._model.config)
        rows.padding = [0]
        with torch.inference_mode():
            self._forward(rows, torch.zeros((1, num_tokens), dtype=torch.long))
        return max(1, rows.cache_bytes // num_tokens)

    def _decode(self) -> Iterable[TokenDelta]:
        self._make_room()
        rows = self._running
        if not rows.sequences:
            return ()
        last = torch.tensor([[sequence.output[-1]] for sequence in rows.sequences])
        return self._advance(rows, self._forward(rows, last))

    def _marks(self) -> list["_Mark"]:
        """Of the requests that hold memory, those that generate first."""
        rows = (self._running, *([] if self._prefilling is None else [self._prefilling]))
        return [_Mark(each, len(each.output)) for group in rows for each in group.sequences]

    def _relieve(self, before: Sequence["_Mark"], shortage: str) -> None:
        """Free every cache, and begin again from the emitted tokens with half as much at once.

        The model stays loaded, so this costs a prefill where a restart costs a load. What a step
        gave to nobody is taken back. Memory that is short only for now is not remembered as such:
        the halves last until the engine's next life.
        """
        for mark in before:
            del mark.sequence.output[mark.num_emitted :]
            mark.sequence.finish_reason = None
        held = {id(mark.sequence): mark.sequence for mark in before}
        if self._prefilling is not None:  # perhaps admitted in this very part
            held |= {id(sequence): sequence for sequence in self._prefilling.sequences}
        others = (sequence for sequence in self._waiting if id(sequence) not in held)
        self._waiting = deque([*held.values(), *others])
        self._prefilling, self._running = None, Rows(self._model.config)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(held) > 1:
            self.max_num_seqs = len(held) // 2
        elif self.max_num_batched_tokens > MIN_BATCHED_TOKENS:
            self.max_num_batched_tokens //= 2
        else:
            raise torch.OutOfMemoryError(shortage)
        self.num_reliefs += 1
        log.warning(
            "batch_relieved", max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens, error=shortage,
        )  # fmt: skip

    def _settle_finished(self) -> Iterable[TokenDelta]:
        """Requests that came with nothing left to generate: a replay of a last token, say."""
        finished = [sequence for sequence in self._waiting if sequence.finish_reason]
        if finished:
            self._waiting = deque(s for s in self._waiting if not s.finish_reason)
        return [delta_of(sequence) for sequence in finished]

    def _admit_and_prefill(self) -> Iterable[TokenDelta]:
        if self._prefilling is None:
            self._prefilling = self._admit()
        return () if self._prefilling is None else self._prefill(self._prefilling)

    def _admit(self) -> Rows | None:
        """The next of those waiting, as many as may be prefilled together."""
        group: list[TokenSequence] = []
        num_running = len(self._running.sequences)
        while self._waiting and num_running + len(group) < self.max_num_seqs:
            lengths = [sequence.num_tokens for sequence in (*group, self._waiting[0])]
            num_padded = max(lengths) * len(lengths)
            worth_it = num_padded <= min(self.max_num_batched_tokens, PADDING_LIMIT * sum(lengths))
            if group and not worth_it:
                break
            if (group or num_running) and not self._fits(
                num_running + len(lengths), max(*lengths, self._running.num_columns) + 1
            ):
                break
            group.append(self._waiting.popleft())
        return Rows(self._model.config, group) if group else None

    def _prefill(self, rows: Rows) -> Iterable[TokenDelta]:
        """At most `max_num_batched_tokens` of the prompts; their first tokens after the last."""
        start, end = rows.num_columns, rows.num_columns + self.max_num_batched_tokens
        logits = self._forward(rows, rows.prompts[:, start:end])
        if rows.num_columns < rows.prompts.shape[1]:
            return ()
        self._prefilling = None
        deltas = self._advance(rows, logits)
        self._running.join(rows)
        return deltas

    def _make_room(self) -> None:
        """Send the youngest back to wait while the cache would outgrow its bytes."""
        rows = self._running
        while len(rows.sequences) > 1 and not self._fits(len(rows.sequences), rows.num_columns + 1):
            self._waiting.appendleft(rows.sequences[-1])
            rows.keep([True] * (len(rows.sequences) - 1) + [False])

    def _fits(self, num_rows: int, num_columns: int) -> bool:
        limit = self._max_cached_tokens
        return limit is None or num_rows * num_columns <= limit

    def _forward(self, rows: Rows, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits of the last column, after these columns were added to the cache."""
        device = self._model.device
        start, end = rows.num_columns, rows.num_columns + token_ids.shape[1]
        columns = torch.arange(end, device=device)
        padding = torch.tensor(rows.padding, device=device)[:, None]
        arguments = {
            "position_ids": (columns[start:] - padding).clamp(min=0),
            "logits_to_keep": 1,
        }
        output = self._model(
            input_ids=token_ids.to(device),
            attention_mask=(columns >= padding).long(),
            past_key_values=rows.cache,
            use_cache=True,
            **{key: arguments[key] for key in arguments if key in self._forward_parameters},
        )
        rows.num_columns = end
        return output.logits[:, -1].float()

    def _advance(self, rows: Rows, logits: torch.Tensor) -> Iterable[TokenDelta]:
        """Choose each row's next token; the rows that it finishes are dropped."""
        tokens = logits.argmax(dim=-1)
        for row, sequence in enumerate(rows.sequences):
            if sequence.processors or sequence.is_sampled:
                tokens[row] = choose(sequence, logits[row : row + 1])
        deltas = []
        for row, (sequence, token) in enumerate(zip(rows.sequences, tokens.tolist(), strict=True)):
            sequence.output.append(token)
            sequence.finish_reason = self._finish_reason(sequence)
            deltas.append(delta_of(sequence, token, logits[row]))
        if any(sequence.finish_reason for sequence in rows.sequences):
            rows.keep([sequence.finish_reason is None for sequence in rows.sequences])
        return deltas

    def _finish_reason(self, sequence: TokenSequence) -> str | None:
        sampling = sequence.request.sampling
        if sequence.output[-1] in self._eos_token_ids and not sampling.ignore_eos:
            return "stop"
        full = len(sequence.output) >= sampling.max_tokens
        return "length" if full or sequence.num_tokens >= self.max_model_len else None
