"""The words of the demo model, which are syllables: its tokenizer and its chat template."""

from itertools import product

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


def make_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
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


def spoken_tokens(vocabulary: dict[str, int]) -> list[int]:
    """The tokens of the grid: all syllables and twelve single letters and marks."""
    syllables = [index for token, index in vocabulary.items() if 1 < len(token) < 5]
    return syllables + [vocabulary[letter] for letter in "aeiou.,!?;:-"]


def tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, object]:
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


def tokenizer_config(max_tokens: int) -> dict[str, object]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": max_tokens,
    }
