"""CUDA graphs: how many an engine captures, what they take, and what it counts of them."""

from vram.gpu import Device
from vram.model import ModelShape
from vram.overhead import EVIDENCE, Overhead, compiles, newer_runner
from vram.settings import EngineSettings
from vram.units import MIB, ceil_div

LARGEST_CAPTURE = 512
# models/config.py of vLLM: gpt-oss captures further.
LARGER_CAPTURES = {"GptOssForCausalLM": 1024}

# The driver's part: so much for each layer of each capture. Exact to 12 MiB in the loads on a card
# of the fit half (the device's use less the allocator's). EVIDENCE
DRIVER_BYTES_PER_LAYER_AND_CAPTURE = int(0.197 * MIB)
DRIVER_BYTES_PER_LAYER_LESS = int(0.7 * MIB)
LATENT_LAUNCHES = 1.8  # kernels of a layer with latent attention, for each of a plain one. EVIDENCE

# The pool's part: the outputs of attention's splits, in 32 bits, for the largest batch of single
# tokens (config/attention.py: flash_attn_max_num_splits_for_cuda_graph).
SPLITS_IN_GRAPHS = 32
SPLIT_OUTPUT_BYTES = 4
# The newer runner holds them more than once, the older one once: factor and base are fitted on the
# fit half. benchmarks/estimator_fit.py
NEWER_POOL_COPIES = 2.10
POOL_BASE_BYTES = 73 * MIB
# The older runner captures a few, counts that much in its budget, and captures the rest later
# (gpu_model_runner.py::profile_cudagraph_memory). Two loads of the fit half: 0.78 and 0.86.
OLDER_ESTIMATE_SHARE = 0.82


def cuda_graphs(
    shape: ModelShape, settings: EngineSettings, device: Device, engine: str
) -> Overhead:
    """What captured graphs take; nothing on the CPU, eager, or where none are made."""
    if not compiles(settings, device, engine):
        return Overhead(size_bytes=0, formula="none are captured", source="settings")
    copies = NEWER_POOL_COPIES if newer_runner(shape, device, engine) else 1.0
    size_bytes = (
        POOL_BASE_BYTES
        + driver_bytes(shape, settings)
        + int(copies * split_outputs_bytes(shape, settings))
    )
    captures = num_captures(shape, settings)
    return Overhead(
        size_bytes=size_bytes,
        formula=(
            f"base + {shape.num_layers} layers x {captures} captures + {copies} x sequences "
            f"x query rows x {SPLITS_IN_GRAPHS} splits x {SPLIT_OUTPUT_BYTES} bytes"
        ),
        source=EVIDENCE,
    )


def counted_graph_bytes(shape: ModelShape, device: Device, engine: str, graph_bytes: int) -> int:
    """What an engine takes out of its budget for graphs before it sizes the cache.

    vLLM 0.26 with its older runner takes its own guess, with the newer one nothing
    (gpu_worker.py::determine_available_memory); what is not counted comes on top.
    """
    if newer_runner(shape, device, engine):
        return 0
    return int(graph_bytes * OLDER_ESTIMATE_SHARE) if engine in ("vllm", "fake") else graph_bytes


def driver_bytes(shape: ModelShape, settings: EngineSettings) -> int:
    """The driver's part, on the GPU with the most layers."""
    captures = num_captures(shape, settings)
    per_layer = DRIVER_BYTES_PER_LAYER_AND_CAPTURE * captures - DRIVER_BYTES_PER_LAYER_LESS
    layers = ceil_div(shape.num_layers, settings.pipeline_parallel_size)
    launches = LATENT_LAUNCHES if shape.is_latent else 1.0
    return int(max(per_layer, 0) * layers * launches)


def split_outputs_bytes(shape: ModelShape, settings: EngineSettings) -> int:
    """One set of outputs of attention's splits, for the largest captured batch of single tokens."""
    rows = ceil_div(shape.query_rows or shape.hidden_size, settings.tensor_parallel_size)
    tokens = min(settings.max_num_seqs, LARGEST_CAPTURE, largest_capture(shape, settings))
    return tokens * rows * SPLITS_IN_GRAPHS * SPLIT_OUTPUT_BYTES


def largest_capture(shape: ModelShape, settings: EngineSettings) -> int:
    """The largest batch that vLLM captures, in tokens."""
    wanted = 2 * settings.max_num_seqs * (1 + settings.num_speculative_tokens)
    largest = LARGER_CAPTURES.get(shape.architecture, min(wanted, LARGEST_CAPTURE))
    largest = min(largest, settings.max_num_batched_tokens)
    return min(largest, settings.max_cudagraph_capture_size or largest)


def num_captures(shape: ModelShape, settings: EngineSettings) -> int:
    """How many batch sizes vLLM captures (config/vllm.py::_set_cudagraph_sizes)."""
    largest = largest_capture(shape, settings)
    sizes = {size for size in (1, 2, 4) if size <= largest}
    sizes.update(range(8, min(largest + 1, 256), 8))
    sizes.update(range(256, largest + 1, 16))
    if settings.max_num_batched_tokens <= largest:
        sizes.add(settings.max_num_batched_tokens)
    return len(sizes)
