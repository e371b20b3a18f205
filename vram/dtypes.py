"""Bytes per element of the number formats that weights and caches come in."""

from vram.errors import UnknownDtype

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPE_ALIASES = {
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
}

KV_CACHE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
    "fp8_inc": 1,
    "fp8_per_token_head": 1,
    "int8": 1,
    "int8_per_token_head": 1,
}
# A 32-bit scale of its own for each key and each value (vLLM: v1/kv_cache_interface.py).
SCALE_BYTES_PER_TOKEN_AND_HEAD = 4
WITH_A_SCALE_PER_TOKEN_AND_HEAD = frozenset({"fp8_per_token_head", "int8_per_token_head"})


def canonical_dtype(name: str, setting: str = "dtype") -> str:
    """One spelling for each computing format: fp16 and half are float16."""
    spelled = name.removeprefix("torch.").lower()
    spelled = DTYPE_ALIASES.get(spelled, spelled)
    if spelled not in DTYPE_BYTES:
        raise UnknownDtype(name[:60], ", ".join(DTYPE_BYTES), setting)
    return spelled


def dtype_bytes(name: str) -> int:
    """Bytes of one weight or activation of this format."""
    return DTYPE_BYTES[canonical_dtype(name)]


def kv_cache_bytes(kv_cache_dtype: str, dtype: str) -> int:
    """Bytes of one cached key or value element; "auto" is the model's own format."""
    name = dtype if kv_cache_dtype == "auto" else kv_cache_dtype
    spelled = DTYPE_ALIASES.get(name, name)
    if spelled not in KV_CACHE_BYTES:
        raise UnknownDtype(name[:60], ", ".join(["auto", *KV_CACHE_BYTES]), "kv_cache_dtype")
    return KV_CACHE_BYTES[spelled]
