"""How many bits a quantised weight takes, its scales and zero points included."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vram.config_reader import ConfigReader
from vram.errors import Invalid


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """One weight format; weights outside its reach keep the model's dtype."""

    method: str
    bits: int
    group_size: int | None
    group_bits: int  # what each group of weights adds: its scale and zero point
    reach: Literal["linear", "experts"] = "linear"

    @property
    def bits_per_weight(self) -> float:
        return self.bits + (self.group_bits / self.group_size if self.group_size else 0.0)

    @staticmethod
    def from_config(config: object) -> "Quantization | None":
        """Reads a checkpoint's quantization_config; None where there is none."""
        if config is None:
            return None
        if not isinstance(config, Mapping):
            raise Invalid("config.json: quantization_config is not an object", "quantization")
        read = ConfigReader(config)
        method = read.text("quant_method", default="").lower()
        if method == "bitsandbytes":
            return named("bitsandbytes-8bit" if config.get("load_in_8bit") else method)
        if method == "compressed-tensors":
            return _compressed_tensors(config)
        if method in ("gptq", "awq"):
            group_size = read.integer("group_size", default=128, lowest=-1, highest=1 << 20)
            return _grouped(method, read.integer("bits", default=4, highest=8), group_size)
        if method == "fp8" and isinstance(config.get("weight_block_size"), list):
            block = read.integers("weight_block_size")
            if len(block) != 2 or min(block) < 1:
                raise Invalid(
                    "config.json: weight_block_size is not two sizes", "weight_block_size"
                )
            rows, columns = block
            return Quantization(method="fp8", bits=8, group_size=rows * columns, group_bits=32)
        return named(method)


# What can also be asked of the engine for a checkpoint that is not quantised, by vLLM's names.
METHODS = {
    "fp8": Quantization(method="fp8", bits=8, group_size=None, group_bits=0),
    # NF4 with one float32 absmax per 64 weights, as vLLM's loader makes it.
    "bitsandbytes": Quantization(method="bitsandbytes", bits=4, group_size=64, group_bits=32),
    "bitsandbytes-8bit": Quantization(method="bitsandbytes", bits=8, group_size=None, group_bits=0),
    # One 16-bit scale per 128 weights, and for the zero point another number of `bits`.
    "gptq": Quantization(method="gptq", bits=4, group_size=128, group_bits=16 + 4),
    "awq": Quantization(method="awq", bits=4, group_size=128, group_bits=16 + 4),
    # Microscaling: one 8-bit exponent per 32 weights; gpt-oss quantises its experts only.
    "mxfp4": Quantization(method="mxfp4", bits=4, group_size=32, group_bits=8, reach="experts"),
}


def named(method: str) -> Quantization:
    """A format by vLLM's name for it."""
    if method not in METHODS:
        raise Invalid(
            f"Unknown quantization {method!r}; known are {', '.join(METHODS)}.", "quantization"
        )
    return METHODS[method]


def _grouped(method: str, bits: int, group_size: int) -> Quantization:
    # -1 is one scale per row: too small to count.
    return Quantization(
        method=method,
        bits=bits,
        group_size=group_size if group_size > 0 else None,
        group_bits=16 + bits,
    )


def _compressed_tensors(config: Mapping[str, Any]) -> Quantization:
    groups = config.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping):
        raise Invalid(
            "config.json: quantization_config has no config_groups.*.weights", "quantization"
        )
    read = ConfigReader(weights)
    group_size = read.integer("group_size", default=-1, lowest=-1, highest=1 << 20)
    return _grouped("compressed-tensors", read.integer("num_bits", highest=16), group_size)
