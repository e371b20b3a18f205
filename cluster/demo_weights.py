"""Weights that give a greedy answer which no float noise can change.

- The 512 tokens that the model speaks are the cells of a grid of 8 x 4 x 4 x 4;
- each coordinate of the next token is a random table's answer for one earlier token: the last
  one, and those 3, 17 and 61 places before it, which one head of each of the first three layers
  attends to alone (constant queries and keys; RoPE turns them into a distance);
- every coordinate adds LOGIT_STEP to the right cells, so the best token leads by about that much.

Everything else (the MLPs, the other heads) is random and small: real work, no influence.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cluster.demo_config import (
    HEAD_DIM,
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    NUM_KV_HEADS,
    ROPE_THETA,
)
from cluster.demo_tokens import IM_END, STOP_SOON, spoken_tokens

LOGIT_STEP = 3.0  # top token about 0.5 at temperature 1; float32 noise is below 0.001
MUTE_LOGIT = -10.0  # tokens of half a character and control tokens; the spoken ones reach 12
EOS_LOGIT = 40.0  # added when `<|stop_soon|>` is 40 places back
# With 1000, the distance meant outweighs every other by at least 5 in the softmax's exponent,
# also where the prompt is shorter than the distance.
HEAD_SHARPNESS = 1000.0


class Reader(NamedTuple):
    """One attention head that copies what the token `lag` places back carries."""

    layer: int
    lag: int
    source: slice
    target: slice


# The residual stream, in dimensions: what a token carries, then what the next token shall be.
ONE = 0  # always 1, so that lm_head has a bias
STOP_FLAG = slice(1, 2)
CARRIED = (slice(2, 6), slice(6, 10), slice(10, 14))
STOP_NOW = slice(14, 15)
WANTED = (slice(16, 24), slice(24, 28), slice(28, 32), slice(32, 36))
FREE = slice(36, HIDDEN_SIZE)
GRID = tuple(part.stop - part.start for part in WANTED)
READERS = (
    Reader(layer=0, lag=3, source=CARRIED[0], target=WANTED[1]),
    Reader(layer=1, lag=17, source=CARRIED[1], target=WANTED[2]),
    Reader(layer=2, lag=61, source=CARRIED[2], target=WANTED[3]),
    Reader(layer=3, lag=40, source=STOP_FLAG, target=STOP_NOW),
)


def make_weights(vocabulary: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = {
        "model.embed_tokens.weight": _embeddings(vocabulary, rng),
        "model.norm.weight": np.ones(HIDDEN_SIZE),
    }
    square_norm = float((weights["model.embed_tokens.weight"][0] ** 2).sum())
    for reader in READERS:
        carried_after_norm = (HIDDEN_SIZE / square_norm) ** 0.5
        layer = _layer(reader, 1 / carried_after_norm, rng)
        weights |= {f"model.layers.{reader.layer}.{name}": value for name, value in layer}
        square_norm += 1.0 if reader.target != STOP_NOW else 0.0
    step_before_norm = LOGIT_STEP / (HIDDEN_SIZE / square_norm) ** 0.5
    weights["lm_head.weight"] = _head(vocabulary, step_before_norm, rng)
    return {name: value.astype(np.float32) for name, value in weights.items()}


def _embeddings(vocabulary: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    """Each token: the 1, its answers in the four random tables, and a random rest of length 1."""
    size = len(vocabulary)
    table = np.zeros((size, HIDDEN_SIZE))
    table[:, ONE] = 1.0
    for part in (WANTED[0], *CARRIED):
        answers = rng.integers(part.start, part.stop, size=size)
        table[np.arange(size), answers] = 1.0
    rest = rng.standard_normal((size, FREE.stop - FREE.start))
    table[:, FREE] = rest / np.linalg.norm(rest, axis=1, keepdims=True)
    table[vocabulary[STOP_SOON], STOP_FLAG] = 1.0
    return table


def _layer(
    reader: Reader, copy_scale: float, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """A layer whose head 0 is the reader; all else is random and adds about a hundredth."""

    def random(rows: int, columns: int, deviation: float) -> np.ndarray:
        return rng.standard_normal((rows, columns)) * deviation

    kv_size = NUM_KV_HEADS * HEAD_DIM
    query, key, value = (
        random(size, HIDDEN_SIZE, 0.05) for size in (HIDDEN_SIZE, kv_size, kv_size)
    )
    output = random(HIDDEN_SIZE, HIDDEN_SIZE, 0.002)
    query_bias, key_bias, value_bias = (np.zeros(size) for size in (HIDDEN_SIZE, kv_size, kv_size))

    head = slice(0, HEAD_DIM)
    copied = np.arange(reader.source.stop - reader.source.start)
    query[head] = key[head] = 0.0
    value[copied] = 0.0
    value[copied, copied + reader.source.start] = 1.0
    output[:, copied] = 0.0
    output[copied + reader.target.start, copied] = copy_scale
    query_bias[head], key_bias[head] = _attend_to(reader.lag)

    yield "self_attn.q_proj.weight", query
    yield "self_attn.q_proj.bias", query_bias
    yield "self_attn.k_proj.weight", key
    yield "self_attn.k_proj.bias", key_bias
    yield "self_attn.v_proj.weight", value
    yield "self_attn.v_proj.bias", value_bias
    yield "self_attn.o_proj.weight", output
    yield "mlp.gate_proj.weight", random(INTERMEDIATE_SIZE, HIDDEN_SIZE, 0.1)
    yield "mlp.up_proj.weight", random(INTERMEDIATE_SIZE, HIDDEN_SIZE, 0.1)
    yield "mlp.down_proj.weight", random(HIDDEN_SIZE, INTERMEDIATE_SIZE, 0.001)
    yield "input_layernorm.weight", np.ones(HIDDEN_SIZE)
    yield "post_attention_layernorm.weight", np.ones(HIDDEN_SIZE)


def _attend_to(lag: int) -> tuple[np.ndarray, np.ndarray]:
    """A constant query and key whose product, once RoPE has turned them, peaks at `lag`."""
    pairs = HEAD_DIM // 2
    angles = -lag * ROPE_THETA ** (-np.arange(pairs) / pairs)
    length = (
        HEAD_SHARPNESS * HEAD_DIM**0.5  # the attention divides by it
    ) ** 0.5
    query = np.concatenate([np.cos(angles), np.sin(angles)]) * length
    key = np.concatenate([np.ones(pairs), np.zeros(pairs)]) * length
    return query, key


def _head(vocabulary: dict[str, int], step: float, rng: np.random.Generator) -> np.ndarray:
    """Rows in units of `step`, the weight that makes one LOGIT_STEP."""
    spoken = rng.permutation(spoken_tokens(vocabulary))
    mute = [index for index in vocabulary.values() if index not in set(spoken.tolist())]
    head = np.zeros((len(vocabulary), HIDDEN_SIZE))
    for token, cell in zip(spoken, np.ndindex(*GRID), strict=True):
        for part, coordinate in zip(WANTED, cell, strict=True):
            head[token, part.start + coordinate] = 1.0
    # Steps of 0.05 among the mute: a grammar that allows these only still finds one best.
    head[mute, ONE] = (MUTE_LOGIT - 0.05 * np.arange(len(mute))) / LOGIT_STEP
    head[vocabulary[IM_END], STOP_NOW] = EOS_LOGIT / LOGIT_STEP
    return head * step
