"""What a model's name says of its size: an approximation, for when there is nothing better.

Never used in the place of a config.json: a name knows no layers, so no cache and no split.
"""

import re
from dataclasses import dataclass

from vram.dtypes import dtype_bytes
from vram.errors import Invalid
from vram.quantization import named

# 8x7B counts each expert's feed-forward only: Mixtral-8x7B has 46.7 of 56 billion.
SHARE_OF_EXPERTS = 0.834
SIZE = re.compile(
    r"(?<![A-Za-z0-9.])(?:(?P<experts>\d{1,3})x)?(?P<number>\d{1,4}(?:\.\d{1,3})?)(?P<unit>[bBmM])"
    r"(?![A-Za-z0-9])"
)
UNITS = {"b": 1e9, "m": 1e6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Approximation:
    """A size read from a name, and how it was read."""

    parameters: float
    note: str


def approximate_parameters(name: str) -> Approximation:
    """`Qwen/Qwen2.5-7B` is 7.0 billion: to 10 % at best (it has 7.62)."""
    found = SIZE.search(name.rsplit("/", 1)[-1][:200])
    if found is None:
        raise Invalid(
            f"{name[:100]!r} names no size such as 7B; give a folder with config.json", "model"
        )
    parameters = float(found["number"]) * UNITS[found["unit"].lower()]
    if found["experts"]:
        parameters *= int(found["experts"]) * SHARE_OF_EXPERTS
    return Approximation(
        parameters=parameters,
        note=f"{parameters / 1e9:.1f} billion parameters by the name {found[0]!r} alone, "
        "off by up to 10 %; config.json says it exactly",
    )


def approximate_weight_bytes(name: str, dtype: str, quantization: str | None = None) -> int:
    """The weights alone, from the name alone."""
    bits = 8.0 * dtype_bytes(dtype)
    if quantization is not None:
        bits = named(quantization).bits_per_weight(4096, 4096)
    return int(approximate_parameters(name).parameters * bits / 8)
