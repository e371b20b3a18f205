"""`--set key=value`: the engine settings that a user pins on the command line."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from vram.errors import Invalid
from vram.settings import EngineSettings
from vram.wishes import Wishes

_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
LARGEST_DIGITS = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """Wishes for the planner, and the settings that it never chooses."""

    wishes: Wishes
    others: Mapping[str, Any]

    def on(self, settings: EngineSettings) -> EngineSettings:
        """The settings with what no wish can say."""
        return replace(settings, **self.others)


def read_pins(words: Sequence[str]) -> Pins:
    """`["max_model_len=8192", "dtype=float16"]`, checked; an unknown key names the known ones."""
    values: dict[str, Any] = {}
    for word in words:
        key, separator, text = word.partition("=")
        key = key.strip().replace("-", "_")
        if not separator:
            raise Invalid(f"--set {word[:60]!r} is not key=value", "set")
        if key not in KNOWN:
            raise Invalid(f"--set knows no {key[:60]!r}; known are {', '.join(KNOWN)}", "set")
        if key in values:
            raise Invalid(f"--set {key} is given twice; leave one out", key)
        values[key] = _value(key, text.strip())
    wished = {field.name for field in fields(Wishes)}
    return Pins(
        wishes=Wishes(**{key: value for key, value in values.items() if key in wished}),
        others={key: value for key, value in values.items() if key not in wished},
    )


def _value(key: str, text: str) -> Any:
    kind, optional = KNOWN[key]
    if optional and text.lower() in ("none", "null"):
        return None
    try:
        if kind is bool:
            return _WORDS[text.lower()]
        if kind is int:
            if len(text) > LARGEST_DIGITS:
                raise ValueError(text)
            return int(text)
        return kind(text) if text else _nothing(key)
    except (KeyError, ValueError):
        raise Invalid(f"--set {key} is {text[:40]!r}; it is {_KINDS[kind]}", key) from None


def _nothing(key: str) -> Any:
    raise Invalid(f"--set {key} has no value", key)


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def _known() -> dict[str, tuple[type, bool]]:
    known = {}
    for each in fields(EngineSettings):
        optional = isinstance(each.type, types.UnionType)
        kind = get_args(each.type)[0] if optional else each.type
        if kind in _KINDS:  # one that a word cannot say is not for the command line
            known[each.name] = (kind, optional)
    return known


# Each setting's type, and whether it may be none; `kv_cache_memory_bytes: int | None` is both.
KNOWN = _known()
