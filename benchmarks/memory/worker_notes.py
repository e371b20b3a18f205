"""What the measured worker wrote, per rank. No torch, no vLLM: the campaign runs without them."""

import json
from pathlib import Path
from typing import Any

NOTES_PATH = "BALLAST_MEMORY_NOTES"  # environment variable: where the notes go, rank appended


def read_notes(path: Path) -> list[list[dict[str, Any]]]:
    """By rank, the steps in order."""
    files = sorted(path.parent.glob(f"{path.name}.rank*"), key=lambda file: _rank(file))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def _rank(file: Path) -> int:
    return int(file.name.rpartition("rank")[2])
