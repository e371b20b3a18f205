"""Which modules a checkpoint left unquantised, from the names and patterns in its config.

The patterns come from strangers and are meant for `re`, where ten characters can take for ever.
Only literals, `.`, `.*`, `\\d+`, `$`, `^` and (a|b) are understood; they match in linear time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from vram.errors import Invalid

# Patterns are tried on every module of every layer: 61 layers x 160 patterns take 0.1 s.
MOST_TRIALS = 10_000
LONGEST_PATTERN = 512
MOST_ALTERNATIVES = 64

ANY = "\0"  # one character, whatever it is; no name has this one


@dataclass(frozen=True, slots=True)
class Pattern:
    """Runs of characters with gaps of any length between them, matched from the start of a name."""

    runs: tuple[str, ...]
    to_the_end: bool

    def matches(self, name: str) -> bool:
        if not _fits(self.runs[0], name, 0):
            return False
        place = len(self.runs[0])
        for run in self.runs[1:-1]:
            place = _next(run, name, place)
            if place < 0:
                return False
        if len(self.runs) == 1:
            return not self.to_the_end or place == len(name)
        last = self.runs[-1]
        if not self.to_the_end:
            return _next(last, name, place) >= 0
        start = len(name) - len(last)
        return start >= place and _fits(last, name, start)


class Modules:
    """The modules that a list of names and patterns names."""

    def __init__(self, entries: Sequence[str]) -> None:
        patterns: list[Pattern] = []
        names: set[tuple[str, ...]] = set()
        for entry in entries:
            if entry.startswith("re:"):
                patterns += parsed(entry.removeprefix("re:"))
            elif "*" in entry:
                patterns.append(_glob(entry))
            else:
                names.add(tuple(entry.split(".")))
        self._patterns = patterns
        self._names = names

    def __bool__(self) -> bool:
        return bool(self._patterns or self._names)

    def check(self, num_layers: int) -> None:
        """Refuses more patterns than can be tried in a moment."""
        if len(self._patterns) * num_layers > MOST_TRIALS:
            raise Invalid(
                f"config.json: quantization_config has {len(self._patterns)} patterns for "
                f"{num_layers} layers; at most {MOST_TRIALS // num_layers} are read",
                "quantization_config",
            )

    def names_any(self, modules: Iterable[str]) -> bool:
        return any(self._names_one(module) for module in modules)

    def _names_one(self, module: str) -> bool:
        if self._names and self._names_part(module.split(".")):
            return True
        return any(pattern.matches(module) for pattern in self._patterns)

    def _names_part(self, parts: list[str]) -> bool:
        """A whole name, one above it, or a piece of it: lists are written in all these ways."""
        return any(
            tuple(parts[start:end]) in self._names
            for start in range(len(parts))
            for end in range(start + 1, len(parts) + 1)
        )


def parsed(regex: str) -> list[Pattern]:
    """The patterns of one regular expression, its alternatives written out."""
    if len(regex) > LONGEST_PATTERN:
        raise _not_understood(regex)
    return [_pattern(alternative, regex) for alternative in _alternatives(regex)]


def _alternatives(regex: str) -> list[str]:
    pieces: list[list[str]] = []
    rest = regex
    while rest:
        opening = rest.find("(")
        if opening < 0 or (opening > 0 and rest[opening - 1] == "\\"):
            pieces.append([rest])
            break
        closing = rest.find(")", opening)
        group = rest[opening + 1 : closing].removeprefix("?:")
        after = rest[closing + 1 : closing + 2]
        if closing < 0 or "(" in group or after in ("*", "+", "?", "{"):
            raise _not_understood(regex)
        pieces += [[rest[:opening]], group.split("|")]
        rest = rest[closing + 1 :]
    written_out = 1
    for piece in pieces:
        written_out *= len(piece)
    if written_out > MOST_ALTERNATIVES:
        raise _not_understood(regex)
    return ["".join(choice) for choice in product(*pieces)]


def _pattern(regex: str, whole: str) -> Pattern:
    runs: list[list[str]] = [[]]
    to_the_end = regex.endswith("$") and not regex.endswith("\\$")
    text = regex.removeprefix("^").removesuffix("$" if to_the_end else "")
    index = 0
    while index < len(text):
        two, character = text[index : index + 2], text[index]
        if two in (".*", ".+"):
            runs.append([])
            index += 2
        elif text[index : index + 3] == "\\d+" or text[index : index + 6] == "[0-9]+":
            runs.append([])
            index += 3 if character == "\\" else 6
        elif character == "\\" and two[1:] in ("d", "w"):
            runs[-1].append(ANY)
            index += 2
        elif character == "\\" and len(two) == 2 and not two[1].isalnum():
            runs[-1].append(two[1])
            index += 2
        elif character == ".":
            runs[-1].append(ANY)
            index += 1
        elif character in "*+?{}[]()|\\":
            raise _not_understood(whole)
        else:
            runs[-1].append(character)
            index += 1
    return Pattern(tuple("".join(run) for run in runs), to_the_end)


def _glob(entry: str) -> Pattern:
    if len(entry) > LONGEST_PATTERN:
        raise _not_understood(entry)
    return Pattern(tuple(entry.split("*")), to_the_end=False)


def _fits(run: str, name: str, place: int) -> bool:
    if ANY not in run:
        return name.startswith(run, place)
    if place + len(run) > len(name):
        return False
    return all(wanted in (ANY, found) for wanted, found in zip(run, name[place:], strict=False))


def _next(run: str, name: str, place: int) -> int:
    """Behind the first fit of the run at or after this place; -1 for none."""
    if ANY not in run:
        found = name.find(run, place)
        return found + len(run) if found >= 0 else -1
    for start in range(place, len(name) - len(run) + 1):
        if _fits(run, name, start):
            return start + len(run)
    return -1


def _not_understood(pattern: str) -> Invalid:
    return Invalid(
        f"config.json: the pattern {pattern[:60]!r} in quantization_config is not understood",
        "quantization_config",
    )
