"""The calibration file: what loads were estimated to take, and what they took. JSON lines.

Several servers of a machine append to it. A line that cannot be read is skipped: whoever wrote it
was killed in the middle of it, or is of another version.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vram.model import ModelShape
from vram.residuals import LoadKind, Residuals, Seen, residuals
from vram.units import MIB

VARIABLE = "BALLAST_CALIBRATION"
FORMAT = 1
LARGEST_FILE_BYTES = 2 * MIB  # some 2,000 loads; then the older half goes
LARGEST_BYTES_OF_AN_ITEM = 1 << 50
MOST_ITEMS = 32
LONGEST_WORD = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One load of a model."""

    load_id: str  # a later line of the same load replaces the earlier
    at_s: float
    architecture: str
    shape: str  # its hash
    engine_version: str
    kind: LoadKind
    estimated: Mapping[str, int]
    measured: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The loads of a file, the oldest first."""

    loads: tuple[Load, ...] = ()
    num_skipped: int = 0  # lines that say nothing

    def of(self, shape: ModelShape, versions: Mapping[str, str | None]) -> tuple[Residuals, ...]:
        """What is learned of a shape. Without the version of an engine: of its newest load here."""
        wanted = shape_hash(shape)
        kinds: dict[LoadKind, list[Load]] = {}
        for load in self.loads:
            if load.shape == wanted and load.architecture == shape.architecture:
                kinds.setdefault(load.kind, []).append(load)
        found = []
        for kind, loads in kinds.items():
            version = versions.get(kind.engine) or loads[-1].engine_version
            same = [load for load in loads if load.engine_version == version]
            if same:
                taken = [Seen(estimated=x.estimated, measured=x.measured) for x in same]
                found.append(residuals(kind, version, taken))
        return tuple(found)


def calibration_path(env: Mapping[str, str]) -> Path:
    """BALLAST_CALIBRATION, else in the user's state folder (XDG base directory specification)."""
    given = env.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    state = env.get("XDG_STATE_HOME", "")
    # A relative one is to be ignored, says the specification.
    folder = Path(state) if Path(state).is_absolute() else Path("~/.local/state").expanduser()
    return folder / "ballast" / "calibration.jsonl"


def shape_hash(shape: ModelShape) -> str:
    """Of all that the shape is by its config.json; not of headers, which only some readers have."""
    plain = replace(shape, checkpoint_ratio=1.0, learned=())
    return hashlib.sha256(repr(plain).encode()).hexdigest()[:16]


def read_calibration(path: Path) -> Calibration:
    """All that can be read of the file; nothing where there is none, or it is no file."""
    try:
        if not path.is_file():
            return Calibration()
        with path.open("rb") as file:
            text = file.read(2 * LARGEST_FILE_BYTES)
    except OSError:
        return Calibration()
    loads: dict[str, Load] = {}
    num_skipped = 0
    for line in text.splitlines():
        load = _parsed(line)
        if load is not None:
            loads.pop(load.load_id, None)
            loads[load.load_id] = load
        elif line.strip():
            num_skipped += 1
    return Calibration(loads=tuple(loads.values()), num_skipped=num_skipped)


def append_load(path: Path, load: Load) -> None:
    """One line at the end, whole or not at all; raises OSError.

    The file is never longer than LARGEST_FILE_BYTES. What is there but no file, as /dev/null, is
    left alone.
    """
    if path.exists() and not path.is_file():
        return
    line = json.dumps({"format": FORMAT, **asdict(load)}).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        before = path.read_bytes() if path.exists() else b""
        if len(before) + len(line) > LARGEST_FILE_BYTES:
            newer = before[-LARGEST_FILE_BYTES // 2 :]
            _replace(path, newer[newer.find(b"\n") + 1 :] + line)
            return
        torn = before and not before.endswith(b"\n")  # its writer was killed in the middle
        with path.open("ab", buffering=0) as file:
            file.write(b"\n" + line if torn else line)


def _parsed(line: bytes) -> Load | None:
    try:
        found = json.loads(line)
        if not isinstance(found, dict) or found.pop("format") != FORMAT:
            return None
        kind = LoadKind(**found.pop("kind"))
        load = Load(kind=kind, **found)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    words = [load.load_id, load.architecture, load.shape, load.engine_version]
    words += [kind.engine, kind.card, kind.form]
    degrees = (kind.tensor_parallel_size, kind.pipeline_parallel_size)
    fine = (
        all(isinstance(word, str) and len(word) <= LONGEST_WORD for word in words)
        and all(type(degree) is int for degree in degrees)
        and type(load.at_s) in (int, float)
        and _are_sizes(load.estimated)
        and _are_sizes(load.measured)
    )
    return load if fine else None


def _are_sizes(given: Any) -> bool:
    return (
        isinstance(given, dict)
        and len(given) <= MOST_ITEMS
        and all(
            type(size) is int and 0 <= size < LARGEST_BYTES_OF_AN_ITEM for size in given.values()
        )
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time; the lock is beside the file, which may be replaced under it."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(path: Path, content: bytes) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        fresh.write_bytes(content)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
