"""The layer between formulas and estimate: items as loads of the very same kind took them."""

from collections.abc import Mapping
from dataclasses import replace

from vram.overhead import Overhead
from vram.residuals import Residuals


def corrected(parts: Mapping[str, Overhead], found: Residuals) -> dict[str, Overhead]:
    """Each item as it was measured; those that no load speaks of as they are."""
    return {name: _corrected(name, part, found) for name, part in parts.items()}


def excess(formula_bytes: int, under_load_bytes: int, found: Residuals) -> Overhead:
    """What the device was seen to hold above its formula, and no item accounts for."""
    seen_bytes = found.corrected("device_use", formula_bytes)
    return Overhead(
        size_bytes=max(seen_bytes - under_load_bytes, 0),
        formula="the device as it was measured - all other items",
        source=_loads(found),
    )


def _corrected(name: str, part: Overhead, found: Residuals) -> Overhead:
    size_bytes = found.corrected(name, part.size_bytes)
    if size_bytes == part.size_bytes:
        return part
    return replace(part, size_bytes=size_bytes, source=f"{part.source}; {_loads(found)}")


def _loads(found: Residuals) -> str:
    return f"loads with {found.kind.engine} {found.engine_version}: {found.num_loads}"
