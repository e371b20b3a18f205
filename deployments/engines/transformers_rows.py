"""Sequences of a batch and the cache that they share. Knows neither a model nor who is next."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from deployments.engines.transformers_sequence import TokenSequence
from deployments.errors import Invalid


class Rows:
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

    def join(self, newcomers: "Rows") -> None:
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
