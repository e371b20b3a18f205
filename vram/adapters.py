"""Slots for LoRA adapters, which vLLM fills with zeros when it loads a model. Not measured."""

from collections import Counter

from vram.dtypes import dtype_bytes
from vram.model import ModelShape
from vram.parts import Tensor
from vram.settings import EngineSettings
from vram.units import ceil_div
from vram.weights import Stage, stages

# Whose vocabulary has slots too: `embedding_modules` in vLLM 0.26, model_executor/models.
WITH_VOCABULARY_SLOTS = frozenset(
    {
        "Cohere2ForCausalLM",
        "CohereForCausalLM",
        "GraniteForCausalLM",
        "JambaForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "NemotronHForCausalLM",
        "PhiMoEForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    }
)


def adapter_bytes(shape: ModelShape, settings: EngineSettings) -> int:
    """Two low-rank factors beside every projection and expert, on the fullest GPU (lora/layers)."""
    if not settings.max_loras:
        return 0
    per_stage = [
        _stage_elements(shape, stage, settings)
        for stage in stages(shape, settings.pipeline_parallel_size)
    ]
    slots = settings.max_loras * settings.max_lora_rank
    return max(per_stage) * slots * dtype_bytes(settings.dtype)


def _stage_elements(shape: ModelShape, stage: Stage, settings: EngineSettings) -> int:
    elements = sum(
        number * count * _elements(tensor, settings)
        for kind, number in Counter(stage.layers).items()
        for tensor, count in shape.kinds[kind].tensors
        if tensor.kind in ("linear", "expert")
    )
    if shape.architecture in WITH_VOCABULARY_SLOTS:
        # vocal_parallel_embedding.py and logits_processor.py: whole on every GPU.
        elements += (stage.is_first + stage.is_last) * (shape.vocab_size + shape.hidden_size)
    return elements


def _elements(tensor: Tensor, settings: EngineSettings) -> int:
    """Of one rank: a factor's input for each fused part, and the output."""
    degree, copies = settings.tensor_parallel_size, tensor.copies
    if tensor.kind == "expert" and settings.expert_parallel:
        degree, copies = 1, ceil_div(copies, degree)
    rows = sum(part.on(degree) for part in tensor.rows)
    return copies * (len(tensor.rows) * tensor.columns.on(degree) + rows)
