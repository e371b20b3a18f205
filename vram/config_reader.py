"""Typed, bounded reading of a config.json that anybody may have written."""

from collections.abc import Mapping
from typing import Any

from vram.errors import Invalid


class ConfigReader:
    """Asks a config for values; every refusal names the key and what was found there."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        if not isinstance(config, Mapping):
            raise Invalid(f"config.json is {_shown(config)}, not an object", "model")
        self._config = config

    def integer(
        self, key: str, *, highest: int, lowest: int = 1, default: int | None = None
    ) -> int:
        value = self._config.get(key)
        if value is None:
            if default is None:
                raise Invalid(f"config.json has no {key}", key)
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise Invalid(f"config.json: {key} is {_shown(value)}, not a whole number", key)
        if not lowest <= value <= highest:
            raise Invalid(
                f"config.json: {key} is {_shown(value)}; {lowest} to {highest} is possible", key
            )
        return value

    def integers(self, key: str) -> list[int]:
        values = self._config.get(key) or []
        if not isinstance(values, list) or any(type(value) is not int for value in values):
            raise Invalid(f"config.json: {key} is {_shown(values)}, not a list of numbers", key)
        return values

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise Invalid(f"config.json: {key} is {_shown(value)}, not true or false", key)
        return value

    def text(self, *keys: str, default: str) -> str:
        """The first of several keys that is set: new configs say dtype, old ones torch_dtype."""
        for key in keys:
            value = self._config.get(key)
            if value is None:
                continue
            if not isinstance(value, str):
                raise Invalid(f"config.json: {key} is {_shown(value)}, not a word", key)
            return value
        return default

    def texts(self, key: str) -> list[str]:
        values = self._config.get(key) or []
        if not isinstance(values, list) or any(not isinstance(value, str) for value in values):
            raise Invalid(f"config.json: {key} is {_shown(values)}, not a list of words", key)
        return values


def _shown(value: object) -> str:
    """A value in an error, short: a hostile one may be megabytes, or an int with 10^6 digits."""
    if isinstance(value, int) and abs(value) > 1 << 64:
        return "a number beyond 2^64"
    shown = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else ""
    return shown[:60] if shown else type(value).__name__
