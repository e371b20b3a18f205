"""A YAML file that somebody wrote: read without surprises, its mistakes said in one sentence."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deployments.errors import Invalid
from vram.units import MIB

# Ours are some kilobytes; what is above this is something else.
LARGEST_FILE_BYTES = 4 * MIB
LONGEST_REASON = 200  # characters


def load_yaml(path: Path) -> Any:
    """Raises `Invalid` with a sentence that lacks the file's name."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE_BYTES + 1)
    except FileNotFoundError:
        raise Invalid("there is no such file") from None
    except OSError as error:
        raise Invalid(f"it can't be read: {error.strerror}") from None
    if len(content) > LARGEST_FILE_BYTES:
        raise Invalid(f"it is above {LARGEST_FILE_BYTES // MIB} MiB and is not read")
    try:
        return yaml.safe_load(content.decode())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise Invalid(f"this is not YAML: {reason}") from None


def sentence(error: ValidationError, where: str = "") -> str:
    """The first of pydantic's problems, with the place in the file."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in (where, *first["loc"]) if part != "")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {place}: remove it or correct its spelling{more}"
    if first["type"] == "missing":
        return f"{place} is missing{more}"
    return f"{place}: {first['msg'].removeprefix('Value error, ')}{more}"
