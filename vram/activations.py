"""What a full batch holds at once while it passes through a model. Reads vLLM's own buffers.

Peaks are of vLLM's profiling run: attention itself is skipped there, so only projections count.
"""

from vram.dtypes import dtype_bytes
from vram.gpu import Device
from vram.model import Block, ModelShape
from vram.overhead import EVIDENCE, Overhead, compiles, newer_runner
from vram.settings import EngineSettings
from vram.units import MIB, ceil_div, round_up
from vram.weights import VOCABULARY_PADDING

# Tensors of max_num_batched_tokens x hidden that live beside the feed-forward's own: residual,
# normed input, output. Exact to 1 MiB in the dense loads. EVIDENCE
HIDDEN_STATES_AT_PEAK = 3
# Eager Qwen2.5, whose queries have biases, holds one more; why is not known. 7B and 14B, EVIDENCE
MORE_WITH_BIASED_QUERIES = 1
# Split and not compiled, the sum over all GPUs is a tensor beside its summands
# (device_communicators: pynccl.py and custom_all_reduce.py sum into an empty one).
MORE_WITH_SUMS = 1
# One kernel for all experts (gpt-oss) keeps a residual and a little of routing. EVIDENCE
HIDDEN_STATES_AT_FUSED_EXPERTS = 1.25
# While it compiles, inductor tries its kernels on made-up inputs (wrapper.py, autotuning block):
# the embedding's is the largest, its table beside two tensors of hidden states. EVIDENCE
HIDDEN_STATES_AT_EMBEDDING = 2
# Split, it makes one; and has several forms, between which inductor empties the second-level cache
# by a tensor of its size (benchmarking.py): 60 MiB on an H200. Exact to 0.02 MiB. EVIDENCE
HIDDEN_STATES_AT_SPLIT_EMBEDDING = 1
SECOND_LEVEL_CACHE_BYTES = 60 * MIB
# cuBLAS's workspace on Hopper; that of inductor's benchmark lies beside the widest layer too. Exact
# likewise. EVIDENCE
WORKSPACE_BYTES = 32 * MIB
COMPILED_BYTES = SECOND_LEVEL_CACHE_BYTES
COMPILED_PARALLEL_BYTES = 5 * MIB  # with tensor parallelism not at the same time. EVIDENCE
# Online fp8 quantises the input beside its 16-bit original, and takes a workspace. EVIDENCE
ONLINE_FP8_BYTES = 36 * MIB

# vLLM's newer runner samples greedily while it profiles: 16-bit logits, beside the hidden states
# of the batch and of each sequence's last token. 0.5 % below the one load where it rules. EVIDENCE
LOGITS_BYTES = 2
# The older one sorts and sums at max_num_seqs, and keeps 36 MiB of inputs. EVIDENCE
SAMPLER_BYTES_PER_LOGIT = 14.4
SAMPLER_BASE_BYTES = 36 * MIB
# Elsewhere torch's own: 16- and 32-bit logits, sorted values, 64-bit indices, sums = 2+4+4+8+4.
PLAIN_SAMPLER_BYTES_PER_LOGIT = 22

# mla_attention.py::determine_chunked_prefill_workspace_size of vLLM.
MOST_UNPACKED_TOKENS = 64 * 1024
UNPACKED_SEQUENCES = 8
UNPACKED_PAGES_PER_SEQUENCE = 4
PAGE_TOKENS = 16


def peak_activation(
    shape: ModelShape, settings: EngineSettings, device: Device, engine: str
) -> Overhead:
    """The most that a forward pass, the embedding or the sampler holds at once."""
    fixed_bytes = _workspace_bytes(shape, settings, device, engine)
    kept_bytes = expert_workspace_bytes(shape, settings)
    candidates = [
        (
            forward_bytes(shape, settings) + fixed_bytes,
            "max_num_batched_tokens x (3 hidden + widest layer) x dtype + workspaces",
        )
    ]
    if compiles(settings, device, engine):
        candidates.append(
            (
                _embedding_bytes(shape, settings),
                "embedding + max_num_batched_tokens x 2 hidden x dtype",
            )
        )
    older = device.kind == "cuda" and not newer_runner(shape, device, engine)
    if shape.encoder_width and older:
        # gpu_model_runner.py::profile_run: a batch of images; what it makes stays for the next.
        images_bytes = (
            settings.max_num_batched_tokens * shape.hidden_size * dtype_bytes(settings.dtype)
        )
        forward, formula = candidates[0]
        candidates[0] = forward + images_bytes, f"{formula} + encoded images"
        candidates.append(
            (
                encoder_bytes(shape, settings) + images_bytes,
                "max_num_batched_tokens of images x the tower's widest layer x dtype",
            )
        )
    if shape.generates:
        sampler_bytes, formula = _sampler(shape, settings, device, engine)
        beside_bytes = WORKSPACE_BYTES if newer_runner(shape, device, engine) else fixed_bytes
        candidates.append((sampler_bytes + kept_bytes + beside_bytes, formula))
    size_bytes, formula = max(candidates)
    return Overhead(size_bytes=size_bytes, formula=formula, source=EVIDENCE)


def encoder_bytes(shape: ModelShape, settings: EngineSettings) -> int:
    """A batch of images that becomes max_num_batched_tokens, in the tower. Not measured."""
    tokens = settings.max_num_batched_tokens  # multimodal/encoder_budget.py of vLLM
    return tokens * shape.encoder_width * dtype_bytes(settings.dtype)


def forward_bytes(shape: ModelShape, settings: EngineSettings) -> int:
    """One full batch at the widest point of the widest layer."""
    return max(_layer_bytes(kind, shape, settings) for kind in shape.kinds)


def expert_workspace_bytes(shape: ModelShape, settings: EngineSettings) -> int:
    """Two buffers for all tokens of all their experts (fused_moe/experts/triton_moe.py); kept."""
    return max(_routed_bytes(kind, settings) for kind in shape.kinds)


def _layer_bytes(kind: Block, shape: ModelShape, settings: EngineSettings) -> int:
    degree, element_bytes = settings.tensor_parallel_size, dtype_bytes(settings.dtype)
    tokens, hidden_size = settings.max_num_batched_tokens, shape.hidden_size

    def batch_bytes(hidden_states: float, width: int) -> int:
        return int(tokens * (hidden_states * hidden_size + width)) * element_bytes

    widest = max((width.on(degree) for width in kind.widths), default=0)
    hidden_states = HIDDEN_STATES_AT_PEAK
    if settings.enforce_eager and kind.biased_queries:
        hidden_states += MORE_WITH_BIASED_QUERIES
    if settings.enforce_eager and degree > 1:
        hidden_states += MORE_WITH_SUMS
    plain_bytes = batch_bytes(hidden_states, widest) + _routed_bytes(kind, settings)
    if kind.routing is not None and kind.fuses_experts:
        rows = kind.routing.projected(degree) + kind.routing.rows.on(degree)
        routed = kind.routing.experts_per_token * rows
        return max(plain_bytes, batch_bytes(HIDDEN_STATES_AT_FUSED_EXPERTS, routed))
    if kind.unpacking is None:
        return plain_bytes
    unpacked_bytes = (
        _unpacked_tokens(settings) * kind.unpacking.rows.on(degree) * element_bytes
        + batch_bytes(HIDDEN_STATES_AT_PEAK, kind.unpacking.beside.on(degree))
        + _routed_bytes(kind, settings)
    )
    return max(plain_bytes, unpacked_bytes)


def _routed_bytes(kind: Block, settings: EngineSettings) -> int:
    routing, degree = kind.routing, settings.tensor_parallel_size
    if routing is None or kind.fuses_experts:
        return 0
    first = max(routing.rows.on(degree), routing.input_size)
    second = max(routing.projected(degree), routing.input_size)
    return (
        settings.max_num_batched_tokens
        * routing.experts_per_token
        * (first + second)
        * dtype_bytes(settings.dtype)
    )


def _unpacked_tokens(settings: EngineSettings) -> int:
    """Cached tokens whose keys and values are unpacked at once."""
    wanted = max(
        UNPACKED_SEQUENCES * settings.max_model_len,
        UNPACKED_PAGES_PER_SEQUENCE * settings.max_num_seqs * PAGE_TOKENS,
    )
    return max(min(wanted, MOST_UNPACKED_TOKENS), settings.max_num_seqs * PAGE_TOKENS)


def _sampler(
    shape: ModelShape, settings: EngineSettings, device: Device, engine: str
) -> tuple[int, str]:
    # Every GPU of a tensor-parallel group gathers all logits (layers/logits_processor.py).
    logits = settings.max_num_seqs * shape.vocab_size
    if newer_runner(shape, device, engine):
        states = settings.max_num_batched_tokens + settings.max_num_seqs
        states_bytes = states * shape.hidden_size * dtype_bytes(settings.dtype)
        return (
            logits * LOGITS_BYTES + states_bytes,
            f"max_num_seqs x vocabulary x {LOGITS_BYTES} bytes + hidden states",
        )
    if device.kind == "cuda" and engine in ("vllm", "fake"):
        return (
            int(logits * SAMPLER_BYTES_PER_LOGIT) + SAMPLER_BASE_BYTES,
            f"max_num_seqs x vocabulary x {SAMPLER_BYTES_PER_LOGIT} bytes + workspaces",
        )
    per_logit = PLAIN_SAMPLER_BYTES_PER_LOGIT
    return logits * per_logit, f"max_num_seqs x vocabulary x {per_logit} bytes"


def _workspace_bytes(
    shape: ModelShape, settings: EngineSettings, device: Device, engine: str
) -> int:
    if device.kind == "cpu":
        return 0
    size_bytes = WORKSPACE_BYTES
    if compiles(settings, device, engine):
        is_parallel = settings.tensor_parallel_size > 1
        size_bytes += COMPILED_PARALLEL_BYTES if is_parallel else COMPILED_BYTES
    if shape.quantization is None and settings.quantization == "fp8":
        size_bytes += ONLINE_FP8_BYTES + settings.max_num_batched_tokens * shape.hidden_size
    return size_bytes


def _embedding_bytes(shape: ModelShape, settings: EngineSettings) -> int:
    degree = settings.tensor_parallel_size
    rows = ceil_div(round_up(shape.vocab_size, VOCABULARY_PADDING), degree)
    states = HIDDEN_STATES_AT_EMBEDDING if degree == 1 else HIDDEN_STATES_AT_SPLIT_EMBEDDING
    states *= settings.max_num_batched_tokens
    size_bytes = (rows + states) * shape.hidden_size * dtype_bytes(settings.dtype)
    return size_bytes + (SECOND_LEVEL_CACHE_BYTES if degree > 1 else 0)
