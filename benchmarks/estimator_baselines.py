"""What other formulas say of the same loads: GPUStack's, accelerate's, the seeds'.

They are judged on what all of them claim to know: the memory that a model with one sequence of its
full context needs on a card, which is what the device held, less the cache, and one sequence.
"""

from benchmarks.estimator_loads import Load
from vram.dtypes import dtype_bytes
from vram.errors import Invalid
from vram.gpu import Device
from vram.model import ModelShape
from vram.model_names import approximate_parameters
from vram.units import GIB
from vram.weights import checkpoint_bits


def baselines(load: Load, device: Device) -> dict[str, float]:
    """Relative errors by formula; a formula that knows nothing of a model is left out."""
    shape, found = load.shape, load.estimated(device)
    degree = load.settings.num_gpus
    sequence_gib = found.sequence_bytes / GIB
    needed_gib = load.measured["device"] - load.measured["kv_cache"] + sequence_gib
    weights_gib = checkpoint_bits(shape) / 8 / GIB / degree
    said = {
        "Ballast": found.needed_bytes / GIB,
        "GPUStack 2.3: weights x 1.2 + 2 GiB": weights_gib * 1.2 + 2,
        "accelerate estimate-memory: weights": weights_gib,
        **_seeds(load, shape, degree),
    }
    return {name: gib / needed_gib - 1 for name, gib in said.items()}


def _seeds(load: Load, shape: ModelShape, degree: int) -> dict[str, float]:
    """seeds.md: parameters from the name; 2 x layers x length x hidden x bytes / (TP x 10^9)."""
    try:
        parameters = approximate_parameters(load.model).parameters
    except Invalid:
        return {}  # gemma-3-1b has a size in its name, phi-3-mini has none
    element_bytes = dtype_bytes(load.settings.dtype)
    weights_bytes = parameters * element_bytes / degree
    cache_bytes = (
        2  # key and value, of all heads: grouped queries are not known to it
        * shape.num_layers
        * load.settings.max_model_len
        * shape.hidden_size
        * element_bytes
        / degree
    )
    return {"seeds: size in the name, KV of all heads": (weights_bytes + cache_bytes) / GIB}
