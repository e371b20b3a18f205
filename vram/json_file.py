"""JSON of a model that somebody else wrote: bounded, and an object, or one clear error."""

import json
from pathlib import Path
from typing import Any

from vram.errors import Invalid


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Raises `Invalid` for a file that is larger, or can't be read."""
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise Invalid(f"{path} cannot be read: {error.strerror}", "model") from error
    if len(content) > most_bytes:
        raise Invalid(f"{path} is above {most_bytes} bytes and is not read", "model")
    return content


def parsed(text: bytes, name: str) -> dict[str, Any]:
    """A JSON object, or one clear error."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{name} is not JSON: {str(error)[:100]}", "model") from error
    if not isinstance(found, dict):
        raise Invalid(f"{name} holds a {type(found).__name__}, not an object", "model")
    return found
