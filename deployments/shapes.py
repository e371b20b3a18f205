"""The shape of the model that a configuration names."""

import os
from pathlib import Path

from deployments.config import ModelConfig
from deployments.engines.registry import engine_versions
from deployments.learning import with_calibration
from vram.checkpoint import read_folder, with_checkpoint
from vram.errors import Invalid
from vram.hub import read_config
from vram.model import ModelShape

# The fake engine has no model; it is planned as a tiny one.
_FAKE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 576,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def shape_of(config: ModelConfig) -> ModelShape:
    """From `config.json` and a folder's headers, with what its loads here have taken.

    Raises `Invalid`, with the model's name, if there is none or if it makes no sense.
    """
    if config.engine == "fake":
        return ModelShape.from_config(_FAKE)
    folder = Path(config.model).expanduser()
    try:
        shape = ModelShape.from_config(read_config(config.model))
        checkpoint = read_folder(folder) if folder.is_dir() else None
        shape = with_checkpoint(shape, checkpoint) if checkpoint else shape
    except Invalid as error:
        raise Invalid(f"{config.name}: {error}", error.setting) from error
    return with_calibration(shape, os.environ, engine_versions())
