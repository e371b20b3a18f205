"""How a checkpoint's weights are packed: bits, scales, and which modules were left alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vram.config_reader import ConfigReader
from vram.errors import Invalid
from vram.module_patterns import Modules
from vram.parts import Packing, Tensor

SCALE_BITS = 16
FLOAT32_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One packing, and the modules it is for; no targets: all of its kinds."""

    packing: Packing
    kinds: tuple[str, ...] = ("linear", "expert")
    targets: Modules | None = None

    def reaches(self, tensor: Tensor, modules: Sequence[str]) -> bool:
        if self.targets is None:
            return tensor.kind in self.kinds
        return tensor.kind in ("linear", "expert") and self.targets.names_any(modules)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """A checkpoint's packing."""

    method: str
    schemes: tuple[Scheme, ...]
    ignored: Modules
    kv_cache_dtype: str | None = None  # what "auto" becomes

    @property
    def by_name(self) -> bool:
        """Whether two layers of one kind may be packed differently."""
        return bool(self.ignored) or any(scheme.targets is not None for scheme in self.schemes)

    def check(self, num_layers: int) -> None:
        """Refuses what cannot be tried on so many layers in a moment."""
        for modules in (self.ignored, *(scheme.targets for scheme in self.schemes)):
            if modules is not None:
                modules.check(num_layers)

    def packing(self, tensor: Tensor, prefix: str = "") -> Packing | None:
        """The packing of one tensor; None where it keeps the model's dtype."""
        if tensor.kind not in ("linear", "expert", "head"):
            return None
        modules = [f"{prefix}{module}" for module in tensor.modules]
        for scheme in self.schemes:
            if scheme.reaches(tensor, modules):
                return None if self.ignored.names_any(modules) else scheme.packing
        return None

    @staticmethod
    def from_config(config: object) -> "Quantization | None":
        """Reads a checkpoint's quantization_config; None where there is none."""
        if config is None:
            return None
        read = ConfigReader(config, "quantization_config")
        method = read.text("quant_method", default="").lower()
        if not method:
            raise Invalid("config.json has no quantization_config.quant_method", "quantization")
        if method not in READERS:
            raise Invalid(
                f"Unknown quantization {method[:60]!r}; known are {', '.join(READERS)}.",
                "quantization",
            )
        return READERS[method](read)


def _integers(method: str, bits: int, group_size: int, zero_bits: int, column_bits: int) -> Packing:
    """GPTQ and AWQ: a 16-bit scale and a zero point of `bits` for each group of a row."""
    return Packing(
        method=method,
        weight_bits=bits,
        scale_bits=SCALE_BITS + zero_bits,
        group_columns=max(group_size, 0),
        column_bits=column_bits,
    )


def _gptq(read: ConfigReader) -> Quantization:
    bits = read.integer("bits", highest=16)
    group_size = read.integer("group_size", default=128, lowest=-1)
    packing = _integers("gptq", bits, group_size, zero_bits=bits, column_bits=FLOAT32_BITS)
    head = ("head",) if read.flag("lm_head", default=False) else ()
    scheme = Scheme(packing=packing, kinds=("linear", "expert", *head))
    return Quantization(method="gptq", schemes=(scheme,), ignored=_ignored(read))


def _awq(read: ConfigReader) -> Quantization:
    bits = read.integer("bits", "w_bit", highest=16)
    group_size = read.integer("group_size", "q_group_size", default=128, lowest=-1)
    zero_bits = bits if read.flag("zero_point", default=True) else 0
    packing = _integers("awq", bits, group_size, zero_bits, column_bits=0)
    return Quantization(method="awq", schemes=(Scheme(packing=packing),), ignored=_ignored(read))


def _bitsandbytes(read: ConfigReader) -> Quantization:
    eight = read.flag("load_in_8bit", default=False)
    packing = METHODS["bitsandbytes-8bit" if eight else "bitsandbytes"]
    return Quantization(
        method="bitsandbytes",
        schemes=(Scheme(packing=packing),),
        ignored=_ignored(read),
    )


def _fp8(read: ConfigReader) -> Quantization:
    block = read.integers("weight_block_size")
    if block and (len(block) != 2 or min(block) < 1):
        raise Invalid("config.json: weight_block_size is not two sizes", "weight_block_size")
    packing = METHODS["fp8"]
    if block:
        packing = Packing(
            method="fp8",
            weight_bits=8,
            scale_bits=FLOAT32_BITS,
            group_rows=block[0],
            group_columns=block[1],
        )
    return Quantization(method="fp8", schemes=(Scheme(packing=packing),), ignored=_ignored(read))


def _fbgemm(read: ConfigReader) -> Quantization:
    scheme = Scheme(packing=_floats("fbgemm_fp8", 8))
    return Quantization(method="fbgemm_fp8", schemes=(scheme,), ignored=_ignored(read))


def _mxfp4(read: ConfigReader) -> Quantization:
    # Only the experts, whatever modules_to_not_convert says (quantization/mxfp4.py of vLLM).
    scheme = Scheme(packing=METHODS["mxfp4"], kinds=("expert",))
    return Quantization(method="mxfp4", schemes=(scheme,), ignored=Modules(()))


def _modelopt(read: ConfigReader) -> Quantization:
    inner = read.section("quantization") if read.has("quantization") else read
    algorithm = inner.text("quant_algo", default="FP8").upper()
    packings = {
        "FP8": METHODS["fp8"],
        "NVFP4": NVFP4,
        "W4A16_NVFP4": NVFP4,
        "MXFP8": Packing(method="mxfp8", weight_bits=8, scale_bits=8, group_columns=32),
    }
    if algorithm not in packings:
        raise Invalid(
            f"Unknown quant_algo {algorithm[:60]!r}; known are {', '.join(packings)}.",
            "quantization",
        )
    cache = inner.text("kv_cache_quant_algo", default="")
    fp8_cache = cache.upper() == "FP8" or _has_fp8_cache(inner)
    return Quantization(
        method="modelopt",
        schemes=(Scheme(packing=packings[algorithm]),),
        ignored=_ignored(inner),
        kv_cache_dtype="fp8" if fp8_cache else None,
    )


def _compressed_tensors(read: ConfigReader) -> Quantization:
    if not read.has("config_groups"):
        raise Invalid("config.json: quantization_config has no config_groups", "quantization")
    groups = read.section("config_groups")
    schemes = []
    for key in groups.keys()[:64]:
        group = groups.section(key)
        if not group.has("weights"):
            continue
        weights = group.section("weights")
        targets = group.texts("targets")
        everything = not targets or "Linear" in targets
        schemes.append(
            Scheme(
                packing=_compressed(weights),
                targets=None if everything else Modules(targets),
            )
        )
    if not schemes:
        raise Invalid(
            "config.json: quantization_config has no config_groups.*.weights", "quantization"
        )
    # A group for some modules decides before one for all.
    schemes.sort(key=lambda scheme: scheme.targets is None)
    return Quantization(
        method="compressed-tensors",
        schemes=tuple(schemes),
        ignored=_ignored(read),
        kv_cache_dtype="fp8" if _has_fp8_cache(read) else None,
    )


def _compressed(weights: ConfigReader) -> Packing:
    bits = weights.integer("num_bits", highest=16)
    group_size = weights.integer("group_size", default=-1, lowest=-1)
    block = weights.integers("block_structure")
    strategy = weights.text("strategy", default="group" if group_size > 0 else "channel")
    if strategy == "block" and len(block) == 2 and min(block) > 0:
        return Packing(
            method="compressed-tensors",
            weight_bits=bits,
            scale_bits=FLOAT32_BITS,
            group_rows=block[0],
            group_columns=block[1],
        )
    if weights.text("type", default="int") == "float":
        if bits == 4:
            return NVFP4
        return _floats("compressed-tensors", bits, per_tensor=strategy == "tensor")
    zero_bits = 0 if weights.flag("symmetric", default=True) else bits
    if strategy == "tensor":
        return Packing(
            method="compressed-tensors", weight_bits=bits, scale_bits=SCALE_BITS, group_rows=0
        )
    return _integers("compressed-tensors", bits, group_size, zero_bits, column_bits=0)


def _floats(method: str, bits: int, *, per_tensor: bool = False) -> Packing:
    """One 32-bit scale for each row, or for all."""
    return Packing(
        method=method,
        weight_bits=bits,
        scale_bits=FLOAT32_BITS,
        group_rows=0 if per_tensor else 1,
    )


def _ignored(read: ConfigReader) -> Modules:
    """Every tool has its own word for it."""
    keys = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
    entries = [entry for key in (*keys, "llm_int8_skip_modules") for entry in read.texts(key)]
    return Modules(entries)


def _has_fp8_cache(read: ConfigReader) -> bool:
    if not read.has("kv_cache_scheme"):
        return False
    scheme = read.section("kv_cache_scheme")
    return scheme.integer("num_bits", default=16) == 8


NVFP4 = Packing(method="nvfp4", weight_bits=4, scale_bits=8, group_columns=16)

# What can also be asked of the engine for a checkpoint that is not quantised, by vLLM's names.
METHODS: Mapping[str, Packing] = {
    "fp8": _floats("fp8", 8, per_tensor=True),
    # NF4 with one float32 absmax per 64 weights, as vLLM's loader makes it.
    "bitsandbytes": Packing(
        method="bitsandbytes", weight_bits=4, scale_bits=FLOAT32_BITS, group_columns=64
    ),
    "bitsandbytes-8bit": _floats("bitsandbytes", 8),
    "gptq": _integers("gptq", 4, 128, zero_bits=4, column_bits=FLOAT32_BITS),
    "awq": _integers("awq", 4, 128, zero_bits=4, column_bits=0),
    # Microscaling: one 8-bit exponent per 32 weights.
    "mxfp4": Packing(method="mxfp4", weight_bits=4, scale_bits=8, group_columns=32),
}

READERS: Mapping[str, Callable[[ConfigReader], Quantization]] = {
    "gptq": _gptq,
    "auto-round": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "compressed-tensors": _compressed_tensors,
}


def named(method: str) -> Packing:
    """A format by vLLM's name for it."""
    if method not in METHODS:
        raise Invalid(
            f"Unknown quantization {method[:60]!r}; known are {', '.join(METHODS)}.", "quantization"
        )
    return METHODS[method]
