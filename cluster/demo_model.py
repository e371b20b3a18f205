"""Writes the demo model: a tiny Qwen2 from a seed, with tokenizer and chat template; no download.

Its text is noise made of syllables. What it is built for is a greedy answer that no float noise
can change, so that a replayed stream can be compared with an undisturbed one, token by token:

- the 512 tokens that it speaks are the cells of a grid of 8 x 4 x 4 x 4;
- each coordinate of the next token is a random table's answer for one earlier token: the last
  one, and those 3, 17 and 61 places before it, which one head of each of the first three layers
  attends to alone (constant queries and keys; RoPE turns them into a distance);
- every coordinate adds LOGIT_STEP to the right cells, so the best token leads by about that much.

Everything else (the MLPs, the other heads) is random and small: real work, no influence.
It does not end its answer by itself, unless `<|stop_soon|>` stands in the prompt: then it says
`<|im_end|>` when that token is 40 places back.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

HIDDEN_SIZE = 128
INTERMEDIATE_SIZE = 576
NUM_LAYERS = 4
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = HIDDEN_SIZE // NUM_HEADS
MAX_POSITIONS = 4096
ROPE_THETA = 10000.0

END_OF_TEXT, IM_START, IM_END, STOP_SOON = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|stop_soon|>",
)
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, STOP_SOON)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Qwen2's own, which transformers puts in place whatever tokenizer.json says.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LOGIT_STEP = 3.0  # top token about 0.5 at temperature 1; float32 noise is below 0.001
MUTE_LOGIT = -10.0  # tokens of half a character and control tokens; the spoken ones reach 12
EOS_LOGIT = 40.0  # added when `<|stop_soon|>` is 40 places back
# With 1000, the distance meant outweighs every other by at least 5 in the softmax's exponent,
# also where the prompt is shorter than the distance.
HEAD_SHARPNESS = 1000.0
MARKER = "ballast_demo.json"


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


def build_demo_model(folder: Path, seed: int = 0) -> None:
    """Write the model to `folder`, unless this version of it already lies there.

    Two processes may do so at once: they write the same bytes, each file by a rename.
    """
    marker: dict[str, object] = {"version": _version(), "seed": seed}
    if _is_complete(folder, marker):
        return
    from safetensors.numpy import save

    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).unlink(missing_ok=True)
    vocabulary, merges = _vocabulary()
    files = {
        "config.json": _as_json(_config(vocabulary)),
        "generation_config.json": _as_json(_generation_config(vocabulary)),
        "tokenizer.json": _as_json(_tokenizer(vocabulary, merges)),
        "tokenizer_config.json": _as_json(_tokenizer_config()),
        "model.safetensors": save(_weights(vocabulary, seed), metadata={"format": "pt"}),
    }
    for name, content in files.items():
        _write(folder / name, content)
    _write(folder / MARKER, _as_json({**marker, "files": sorted(files)}))


def _version() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def _is_complete(folder: Path, marker: dict[str, object]) -> bool:
    try:
        found = json.loads((folder / MARKER).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return marker.items() <= found.items() and all(
        (folder / name).exists() for name in found["files"]
    )


def _write(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(path)


def _as_json(value: dict[str, object]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _config(vocabulary: dict[str, int]) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary[END_OF_TEXT],
        "eos_token_id": vocabulary[IM_END],
        "hidden_act": "silu",
        "hidden_size": HIDDEN_SIZE,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE_SIZE,
        "max_position_embeddings": MAX_POSITIONS,
        "max_window_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_hidden_layers": NUM_LAYERS,
        "num_key_value_heads": NUM_KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": len(vocabulary),
    }


def _generation_config(vocabulary: dict[str, int]) -> dict[str, object]:
    return {
        "bos_token_id": vocabulary[END_OF_TEXT],
        "eos_token_id": [vocabulary[IM_END], vocabulary[END_OF_TEXT]],
        "pad_token_id": vocabulary[END_OF_TEXT],
        "do_sample": False,
    }


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Every byte, then syllables: ba, ban, _ba, _ban, _bar; then the special tokens."""
    syllables = [
        (consonant, vowel) for consonant, vowel in product("bcdfghjklmnpqrstvwxz", "aeiou")
    ]
    space = _byte_letters()[ord(" ")]
    merges = [
        *((consonant, vowel) for consonant, vowel in syllables),
        *((consonant + vowel, "n") for consonant, vowel in syllables),
        *((space, consonant + vowel) for consonant, vowel in syllables),
        *((space, consonant + vowel + "n") for consonant, vowel in syllables),
        *((space + consonant + vowel, "r") for consonant, vowel in syllables),
    ]
    tokens = [*_byte_letters(), *(left + right for left, right in merges), *SPECIAL_TOKENS]
    return {token: index for index, token in enumerate(tokens)}, merges


def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: itself, or one above 255."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in plain)
    replaced = {byte: 256 + index for index, byte in enumerate(others)}
    return [chr(replaced.get(byte, byte)) for byte in range(256)]


def _spoken_tokens(vocabulary: dict[str, int]) -> list[int]:
    """The tokens of the grid: all syllables and twelve single letters and marks."""
    syllables = [index for token, index in vocabulary.items() if 1 < len(token) < 5]
    return syllables + [vocabulary[letter] for letter in "aeiou.,!?;:-"]


def _tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, object]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": vocabulary[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token in SPECIAL_TOKENS
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": WORD_PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {**byte_level, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {
                token: index for token, index in vocabulary.items() if token not in SPECIAL_TOKENS
            },
            "merges": [list(pair) for pair in merges],
        },
    }


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": MAX_POSITIONS,
    }


def _weights(vocabulary: dict[str, int], seed: int) -> "dict[str, np.ndarray]":
    import numpy as np

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


def _embeddings(vocabulary: dict[str, int], rng: "np.random.Generator") -> "np.ndarray":
    """Each token: the 1, its answers in the four random tables, and a random rest of length 1."""
    import numpy as np

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
    reader: Reader, copy_scale: float, rng: "np.random.Generator"
) -> "Iterator[tuple[str, np.ndarray]]":
    """A layer whose head 0 is the reader; all else is random and adds about a hundredth."""
    import numpy as np

    def random(rows: int, columns: int, deviation: float) -> "np.ndarray":
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


def _attend_to(lag: int) -> "tuple[np.ndarray, np.ndarray]":
    """A constant query and key whose product, once RoPE has turned them, peaks at `lag`."""
    import numpy as np

    pairs = HEAD_DIM // 2
    angles = -lag * ROPE_THETA ** (-np.arange(pairs) / pairs)
    length = (
        HEAD_SHARPNESS * HEAD_DIM**0.5  # the attention divides by it
    ) ** 0.5
    query = np.concatenate([np.cos(angles), np.sin(angles)]) * length
    key = np.concatenate([np.ones(pairs), np.zeros(pairs)]) * length
    return query, key


def _head(vocabulary: dict[str, int], step: float, rng: "np.random.Generator") -> "np.ndarray":
    """Rows in units of `step`, the weight that makes one LOGIT_STEP."""
    import numpy as np

    spoken = rng.permutation(_spoken_tokens(vocabulary))
    mute = [index for index in vocabulary.values() if index not in set(spoken.tolist())]
    head = np.zeros((len(vocabulary), HIDDEN_SIZE))
    for token, cell in zip(spoken, np.ndindex(*GRID), strict=True):
        for part, coordinate in zip(WANTED, cell, strict=True):
            head[token, part.start + coordinate] = 1.0
    # Steps of 0.05 among the mute: a grammar that allows these only still finds one best.
    head[mute, ONE] = (MUTE_LOGIT - 0.05 * np.arange(len(mute))) / LOGIT_STEP
    head[vocabulary[IM_END], STOP_NOW] = EOS_LOGIT / LOGIT_STEP
    return head * step
