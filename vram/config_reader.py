"""Typed, bounded reading of a config.json that anybody may have written."""

from collections.abc import Mapping
from typing import Any

from vram.errors import Invalid

# No published model comes near these; a config beyond them is damaged or hostile.
MOST_LAYERS = 1024
MOST_HEADS = 4096
MOST_EXPERTS = 4096
LARGEST_SIDE = 1 << 22  # of a matrix
LARGEST_CONTEXT = 1 << 27
LONGEST_LIST_OF_NUMBERS = 1 << 12
LONGEST_LIST_OF_WORDS = 1 << 14


class ConfigReader:
    """Asks a config for values; every refusal names the key and what was found there."""

    def __init__(
        self, config: object, where: str = "", defaults: Mapping[str, Any] | None = None
    ) -> None:
        if not isinstance(config, Mapping):
            raise Invalid(
                f"config.json{where and ': ' + where} is {_shown(config)}, not an object",
                where or "model",
            )
        self._config = config
        self._where = where
        self.defaults = defaults or {}

    def has(self, key: str) -> bool:
        return self._value(key) is not None

    def table(self, key: str) -> object:
        """Whatever stands there, for a reader of its own."""
        return self._value(key)

    def keys(self) -> list[str]:
        return [key for key in self._config if isinstance(key, str)]

    def is_text(self, key: str) -> bool:
        """Whether a number was left to be derived: "auto"."""
        return isinstance(self._value(key), str)

    def length(self, key: str) -> int:
        """Entries of a table, 0 for none."""
        value = self._value(key)
        return len(value) if isinstance(value, Mapping) else 0

    def section(self, key: str, defaults: Mapping[str, Any] | None = None) -> "ConfigReader":
        """A part of the config; transformers leaves out of it what equals the class's default."""
        value = self._config.get(key)
        if value is None:
            raise Invalid(f"config.json has no {self._path(key)}", self._path(key))
        return ConfigReader(value, self._path(key), defaults)

    def integer(
        self, *keys: str, highest: int = LARGEST_SIDE, lowest: int = 1, default: int | None = None
    ) -> int:
        """The first of several keys that is set: families name the same number differently."""
        key, value = self._first(keys)
        if value is None:
            if default is None:
                raise Invalid(f"config.json has no {self._path(keys[0])}", self._path(keys[0]))
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, value, "not a whole number")
        if not lowest <= value <= highest:
            raise Invalid(
                f"config.json: {self._path(key)} is {_shown(value)}; "
                f"{lowest} to {highest} is possible",
                self._path(key),
            )
        return value

    def layers(self, *keys: str) -> int:
        return self.integer(*(keys or ("num_hidden_layers",)), highest=MOST_LAYERS)

    def heads(self, *keys: str, default: int | None = None) -> int:
        return self.integer(
            *(keys or ("num_attention_heads",)), highest=MOST_HEADS, default=default
        )

    def context(self, *keys: str, default: int | None = None) -> int:
        return self.integer(
            *(keys or ("max_position_embeddings",)), highest=LARGEST_CONTEXT, default=default
        )

    def integers(self, key: str) -> list[int]:
        return self._list(key, int, "a list of numbers", LONGEST_LIST_OF_NUMBERS)

    def texts(self, key: str) -> list[str]:
        return self._list(key, str, "a list of words", LONGEST_LIST_OF_WORDS)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, value, "not true or false")
        return value

    def number(self, key: str, *, default: float) -> float:
        value = self._value(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(key, value, "not a number")
        if not 0 < value <= LARGEST_CONTEXT:
            raise self._wrong(key, value, f"not above 0 and at most {LARGEST_CONTEXT}")
        return float(value)

    def text(self, *keys: str, default: str) -> str:
        """The first of several keys that is set: new configs say dtype, old ones torch_dtype."""
        key, value = self._first(keys)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, value, "not a word")
        return value

    def _value(self, key: str) -> Any:
        # A key that says null says that there is none: DeepSeek-V2-Lite's `q_lora_rank`.
        return self._config[key] if key in self._config else self.defaults.get(key)

    def _first(self, keys: tuple[str, ...]) -> tuple[str, Any]:
        for key in keys:
            value = self._value(key)
            if value is not None:
                return key, value
        return keys[0], None

    def _list(self, key: str, kind: type, what: str, longest: int) -> list[Any]:
        values = self._value(key)
        if values is None:
            return []
        if isinstance(values, list) and len(values) > longest:
            raise Invalid(
                f"config.json: {self._path(key)} has {len(values)} entries; {longest} is possible",
                self._path(key),
            )
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise self._wrong(key, values, f"not {what}")
        return values

    def _path(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def _wrong(self, key: str, value: object, problem: str) -> Invalid:
        path = self._path(key)
        return Invalid(f"config.json: {path} is {_shown(value)}, {problem}", path)


def _shown(value: object) -> str:
    """A value in an error, short: a hostile one may be megabytes, or an int with 10^6 digits."""
    if isinstance(value, int) and abs(value) > 1 << 64:
        return "a number beyond 2^64"
    shown = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else ""
    return shown[:60] if shown else type(value).__name__
