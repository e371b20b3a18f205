"""Which layers see only the last tokens of a context."""

from collections.abc import Callable

from vram.config_reader import LARGEST_CONTEXT, ConfigReader
from vram.errors import Invalid

# (config, number of layers) -> the window of each layer, None for the whole context.
Windows = Callable[[ConfigReader, int], list[int | None]]


def nowhere(read: ConfigReader, num_layers: int) -> list[int | None]:
    return [None] * num_layers


def everywhere(read: ConfigReader, num_layers: int) -> list[int | None]:
    """Mistral 7B v0.1, Phi-3, StarCoder2."""
    return by_layer_types(read, num_layers) or [_window(read)] * num_layers


def alternating(read: ConfigReader, num_layers: int) -> list[int | None]:
    """Gemma 2 and gpt-oss: the first, third, … layer."""
    window = _window(read)
    return by_layer_types(read, num_layers) or [
        window if index % 2 == 0 else None for index in range(num_layers)
    ]


def all_but_every(pattern_key: str, default: int) -> Windows:
    """Gemma 3, Cohere 2: one layer in a pattern sees everything."""

    def windows(read: ConfigReader, num_layers: int) -> list[int | None]:
        pattern = read.integer(pattern_key, default=default)
        window = _window(read)
        return by_layer_types(read, num_layers) or [
            None if (index + 1) % pattern == 0 else window for index in range(num_layers)
        ]

    return windows


def from_some_layer(read: ConfigReader, num_layers: int) -> list[int | None]:
    """Qwen2 and Qwen3: switched by use_sliding_window, from max_window_layers on."""
    if not read.flag("use_sliding_window", default=False):
        return [None] * num_layers
    first = read.integer("max_window_layers", lowest=0, default=28)
    window = _window(read)
    return by_layer_types(read, num_layers) or [
        window if index >= first else None for index in range(num_layers)
    ]


def by_layer_types(read: ConfigReader, num_layers: int) -> list[int | None]:
    """From layer_types where config.json has it; empty where it has not."""
    kinds = read.texts("layer_types")
    if not kinds:
        return []
    if len(kinds) != num_layers:
        raise Invalid(
            f"config.json: {len(kinds)} layer_types for {num_layers} layers", "layer_types"
        )
    window = _window(read)
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _window(read: ConfigReader) -> int | None:
    return read.integer("sliding_window", lowest=0, highest=LARGEST_CONTEXT, default=0) or None
