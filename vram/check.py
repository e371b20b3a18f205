"""What more memory would not help: a split, a context or a device that is not allowed."""

from vram.engines import ENGINES, ENGINES_ON_CPU
from vram.errors import Invalid
from vram.gpu import Device
from vram.model import ModelShape
from vram.quantization import named
from vram.settings import EngineSettings


def check(shape: ModelShape, settings: EngineSettings, device: Device, engine: str) -> None:
    """Refuses an unknown engine, and a split or a context that the model does not allow."""
    if engine not in ENGINES:
        raise Invalid(f"Unknown engine {engine!r}; known are {', '.join(ENGINES)}.", "engine")
    if device.kind == "cpu" and engine not in ENGINES_ON_CPU:
        raise Invalid(
            f"{engine} does not run on the CPU; {', '.join(ENGINES_ON_CPU)} do.", "engine"
        )
    if device.kind == "cpu" and settings.num_gpus > 1:
        raise Invalid(
            f"The CPU is one device; {settings.num_gpus} are asked for", "tensor_parallel_size"
        )
    if engine == "transformers" and settings.num_gpus > 1:
        raise Invalid(
            f"The transformers engine runs on one GPU; {settings.num_gpus} are asked for: serve "
            "the model with vllm, or leave both parallel sizes at 1",
            "tensor_parallel_size",
        )
    degree = settings.tensor_parallel_size
    problem = shape.split_problem(degree) if degree > 1 else ""
    if problem:
        raise Invalid(f"tensor_parallel_size {degree}: {problem}", "tensor_parallel_size")
    if settings.pipeline_parallel_size > shape.num_layers:
        raise Invalid(
            f"pipeline_parallel_size {settings.pipeline_parallel_size} is more than "
            f"the {shape.num_layers} layers",
            "pipeline_parallel_size",
        )
    if settings.max_model_len > shape.max_context_tokens:
        raise Invalid(
            f"max_model_len {settings.max_model_len} is above the model's maximum of "
            f"{shape.max_context_tokens} tokens; a longer one needs rope_scaling in config.json",
            "max_model_len",
        )
    if shape.quantization is None and settings.quantization is not None:
        named(settings.quantization)
