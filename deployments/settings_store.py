"""The settings that worked, kept outside the replicas: one JSON file for each model on each card.

Several replicas and servers of a machine share it. A file that can't be read, or is of something
else, is warned of once and passed over: without it a replica begins as asked.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog
from pydantic import TypeAdapter

from deployments.remembered import Remembered
from vram.errors import BallastError

VARIABLE = "BALLAST_STATE"
FORMAT = 1
MOST_MODELS = 256  # then the oldest is forgotten
LARGEST_FILE_BYTES = 1 << 16
_REMEMBERED = TypeAdapter(Remembered)
log = structlog.get_logger(__name__)


def state_folder(env: Mapping[str, str]) -> Path:
    """BALLAST_STATE, else in the user's state folder (XDG base directory specification)."""
    given = env.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    state = env.get("XDG_STATE_HOME", "")
    # A relative one is to be ignored, says the specification.
    folder = Path(state) if Path(state).is_absolute() else Path("~/.local/state").expanduser()
    return folder / "ballast"


class SettingsStore:
    """The memory of one model on one card, and the lease of whoever climbs.

    `of` says what it is of: all that has to be the same for the settings to be worth anything. A
    folder that is none, as /dev/null, keeps nothing.
    """

    def __init__(self, folder: Path, of: Mapping[str, Any]) -> None:
        plain = json.dumps(of, sort_keys=True, default=str)
        self._of = json.loads(plain)
        self._key = hashlib.sha256(plain.encode()).hexdigest()
        self._folder = folder / "settings"
        self._path = self._folder / f"{self._key}.json"
        self._lease = self._folder / f"{self._key}.lease"
        self._is_off = folder.exists() and not folder.is_dir()
        self._warned: set[str] = set()

    def read(self) -> Remembered | None:
        found = self._read(self._path)
        if found is None:
            return None
        try:
            if found["format"] != FORMAT or found["of"] != self._of:
                raise ValueError("it is of another version or of another model")
            text = json.dumps(found["remembered"])
            return _REMEMBERED.validate_json(text, strict=True)
        except (ValueError, TypeError, KeyError, BallastError) as error:
            self._warn("settings_not_read", self._path, error)
            return None

    def write(self, remembered: Remembered) -> None:
        document = {"format": FORMAT, "of": self._of, "remembered": asdict(remembered)}

        def write() -> None:
            _replace(self._path, document)
            self._forget_oldest()

        self._change(write)

    def forget(self) -> None:
        """The settings as asked serve again."""
        if self._path.exists():
            self._change(lambda: self._path.unlink(missing_ok=True))

    def take_lease(self, holder: str, *, now_s: float, until_s: float) -> bool:
        """Whether `holder` may climb; renews its own. Where nothing can be kept, it may."""
        is_free = True

        def take() -> None:
            nonlocal is_free
            is_free = self.lease_holder(now_s) in (None, holder)
            if is_free:
                _replace(self._lease, {"holder": holder, "until_s": until_s})

        self._change(take)
        return is_free

    def lease_holder(self, now_s: float) -> str | None:
        lease = self._read(self._lease)
        if lease is None:
            return None
        holder, until_s = lease.get("holder"), lease.get("until_s")
        if not isinstance(holder, str) or not isinstance(until_s, int | float):
            return None
        return holder if now_s < until_s else None

    def release_lease(self, holder: str) -> None:
        def release() -> None:
            if (self._read(self._lease) or {}).get("holder") == holder:
                self._lease.unlink(missing_ok=True)

        if self._lease.exists():
            self._change(release)

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            if not path.is_file():
                return None
            with path.open("rb") as file:
                found = json.loads(file.read(LARGEST_FILE_BYTES))
            if not isinstance(found, dict):
                raise ValueError("it holds no object")
        except (OSError, ValueError, RecursionError) as error:
            self._warn("settings_not_read", path, error)
            return None
        return found

    def _change(self, change: Callable[[], None]) -> None:
        """One writer at a time; what can't be kept is said once and passed over."""
        if self._is_off:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                change()
        except OSError as error:
            self._warn("settings_not_kept", self._folder, error)

    def _forget_oldest(self) -> None:
        files = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in files[:-MOST_MODELS]:
            path.unlink(missing_ok=True)

    def _warn(self, event: str, path: Path, error: Exception) -> None:
        if event not in self._warned:
            self._warned.add(event)
            log.warning(event, path=str(path), error=f"{type(error).__name__}: {error}")


def _replace(path: Path, document: Mapping[str, Any]) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps(document))
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
