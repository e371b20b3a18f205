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
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from deployments.engines.protocol import TokenDelta, TokenRequest, TokenStep
from deployments.engines.transformers_sequence import (
    TokenSequence,
    choose,
    delta_of,
    eos_token_ids_of,
    processors_of,
)
from deployments.errors import Invalid

PADDING_LIMIT = 1.5  # prompts are prefilled together while padding adds no more than half


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
        self._model = model
        self._eos_token_ids = eos_token_ids_of(model)
        self._forward_parameters = inspect.signature(model.forward).parameters
        self._waiting: deque[TokenSequence] = deque()
        self._prefilling: _Rows | None = None  # several steps long only for one long prompt
        self._running = _Rows(model.config)
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
        """One token for every running request, and the next share of the newcomers' prompts."""
        with torch.inference_mode():
            deltas = [*self._decode(), *self._settle_finished()]
            if self._prefilling is None:
                self._prefilling = self._admit()
            if self._prefilling is not None:
                deltas += self._prefill(self._prefilling)
        return TokenStep(outputs=tuple(deltas))

    def rehearse(self, num_tokens: int) -> int:
        """Prefill this much of nothing, so that what does not fit fails now; bytes a token."""
        rows = _Rows(self._model.config)
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

    def _settle_finished(self) -> Iterable[TokenDelta]:
        """Requests that came with nothing left to generate: a replay of a last token, say."""
        finished = [sequence for sequence in self._waiting if sequence.finish_reason]
        if finished:
            self._waiting = deque(s for s in self._waiting if not s.finish_reason)
        return [delta_of(sequence) for sequence in finished]

    def _admit(self) -> "_Rows | None":
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
        return _Rows(self._model.config, group) if group else None

    def _prefill(self, rows: "_Rows") -> Iterable[TokenDelta]:
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

    def _forward(self, rows: "_Rows", token_ids: torch.Tensor) -> torch.Tensor:
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

    def _advance(self, rows: "_Rows", logits: torch.Tensor) -> Iterable[TokenDelta]:
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


class _Rows:
    """Sequences that share a cache, padded on the left so that all end in its last column."""

    def __init__(self, config: Any, sequences: Sequence[TokenSequence] = ()) -> None:
        self._config = config
        self.cache = _empty_cache(config)
        self.num_columns = 0
        self.sequences = list(sequences)
        longest = max((sequence.num_tokens for sequence in sequences), default=0)
        self.padding = [longest - sequence.num_tokens for sequence in sequences]
        self.prompts = torch.tensor(
            [
                [0] * padding + sequence.token_ids
                for padding, sequence in zip(self.padding, sequences, strict=True)
            ]
        )

    @property
    def cache_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    def keep(self, mask: Sequence[bool]) -> None:
        """Drop the other rows, then the columns that only they had filled."""
        kept = [row for row, wanted in enumerate(mask) if wanted]
        self.sequences = [self.sequences[row] for row in kept]
        self.padding = [self.padding[row] for row in kept]
        if kept:
            self.cache.batch_select_indices(torch.tensor(kept, device=self._device))
            self._resize(self.num_columns - min(self.padding))
        else:
            self.cache, self.num_columns = _empty_cache(self._config), 0

    def join(self, newcomers: "_Rows") -> None:
        """Take over the rows of another cache."""
        if not newcomers.sequences:
            return
        if not self.sequences:
            self.cache, self.num_columns = newcomers.cache, newcomers.num_columns
        else:
            num_columns = max(self.num_columns, newcomers.num_columns)
            self._resize(num_columns)
            newcomers._resize(num_columns)
            for ours, theirs in zip(self.cache.layers, newcomers.cache.layers, strict=True):
                ours.keys = torch.cat([ours.keys, theirs.keys])
                ours.values = torch.cat([ours.values, theirs.values])
        self.sequences += newcomers.sequences
        self.padding += newcomers.padding

    def _resize(self, num_columns: int) -> None:
        """Add padding columns on the left, or take some away."""
        if num_columns == self.num_columns:
            return
        for layer in self.cache.layers:
            width = num_columns
            if layer.is_sliding:
                width = min(num_columns, layer.sliding_window - 1)
                layer.cumulative_length = num_columns
            layer.keys = _pad_left(layer.keys, width)
            layer.values = _pad_left(layer.values, width)
        self.padding = [padding + num_columns - self.num_columns for padding in self.padding]
        self.num_columns = num_columns

    @property
    def _device(self) -> torch.device:
        return self.cache.layers[0].keys.device


def _empty_cache(config: Any) -> DynamicCache:
    cache = DynamicCache(config=config)
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise Invalid(
                f"the transformers engine can't batch {config.model_type}: its cache has "
                f"{type(layer).__name__}s, which can't be padded; serve it with vllm"
            )
    return cache


def _pad_left(states: torch.Tensor, width: int) -> torch.Tensor:
    """Zeros before the oldest columns, or without the oldest ones: [row, head, column, dim]."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))
