"""A LoRA adapter for the demo model, made from a seed. Has no tests."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from cluster.demo_config import HIDDEN_SIZE, NUM_LAYERS

RANK = 4


def build_adapter(folder: Path, seed: int = 0) -> None:
    """Two random factors beside each layer's last projection: enough for another answer."""
    rng = np.random.default_rng(seed)
    shapes = {"lora_A": (RANK, HIDDEN_SIZE), "lora_B": (HIDDEN_SIZE, RANK)}
    factors = {
        f"base_model.model.model.layers.{layer}.self_attn.o_proj.{name}.weight": (
            rng.standard_normal(shape).astype(np.float32)
        )
        for layer in range(NUM_LAYERS)
        for name, shape in shapes.items()
    }
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["o_proj"]}
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(factors, folder / "adapter_model.safetensors")
