"""What every family's builder returns: a model's layers, its two ends, and its contexts."""

from dataclasses import dataclass, replace

from vram.config_reader import LARGEST_CONTEXT, ConfigReader
from vram.families.blocks import embedding
from vram.parts import Layer, Tensor, vector, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A model, before its number formats are known."""

    layers: tuple[Layer, ...]  # in order; equal ones are the same object
    layer_prefix: str = "model.layers."
    first: tuple[Tensor, ...]  # what the first stage of a pipeline holds besides layers
    last: tuple[Tensor, ...]
    head: Tensor | None = None  # the last stage's; the embedding's own when tied
    tied: bool = False
    hidden_size: int
    vocab_size: int
    max_context_tokens: int
    rope_elements: int = 0
    generates: bool = True  # False: it embeds, ranks or classifies
    routed: bool = False  # a mixture of experts
    encoder_width: int = 0  # elements that encoding one token of an image holds at once


# The keys that vLLM looks for (transformers_utils/model_arch_config_convertor.py).
CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# These stretch positions inside max_position_embeddings; the others multiply it.
ALREADY_COUNTED = ("su", "longrope", "llama3", "default", "mrope", "proportional")


def max_context(read: ConfigReader, *, scaled: bool = True, default: int | None = None) -> int:
    """The longest context, as vLLM derives it (config/model.py::_get_and_verify_max_len)."""
    found = [read.context(key) for key in CONTEXT_KEYS if read.has(key)]
    tokens = min(found) if found else read.context(default=default)
    scaling = _scaling(read)
    if scaling is None or not scaled:
        return tokens
    kind = scaling.text("rope_type", "type", default="default")
    if kind in ALREADY_COUNTED:
        return tokens
    if kind == "yarn":
        tokens = scaling.context("original_max_position_embeddings", default=tokens)
    return min(int(tokens * scaling.number("factor", default=1.0)), LARGEST_CONTEXT)


def rope_elements(read: ConfigReader, head_dim: int, *, tables: int = 1) -> int:
    """The table of rotary positions: cosines and sines, one for all layers of a kind."""
    share = read.number("partial_rotary_factor", default=1.0)
    if read.has("rope_parameters"):
        share = _scaling_or_empty(read).number("partial_rotary_factor", default=share)
    positions = max_context(read)
    scaling = _scaling(read)
    if scaling is not None and scaling.has("mrope_section"):
        positions *= 4  # rotary_embedding/mrope.py: cache_max_position_num
    return tables * positions * int(head_dim * min(share, 1.0))


def ends(
    read: ConfigReader,
    *,
    hidden_size: int,
    vocab_size: int,
    tied: bool,
    embedding_module: str = "model.embed_tokens",
    norm_module: str = "model.norm",
    head_module: str = "lm_head",
    norm_bias: bool = False,
    head_bias: bool = False,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
    """Embedding, final norm and head."""
    first = (embedding(embedding_module, vocab_size, hidden_size),)
    last = [vector(norm_module, *(whole(hidden_size),) * (2 if norm_bias else 1))]
    if head_bias:
        last.append(vector(f"{head_module}.bias", whole(vocab_size)))
    if tied:
        return first, tuple(last), None
    head = replace(embedding(head_module, vocab_size, hidden_size), kind="head")
    return first, tuple(last), head


def _scaling(read: ConfigReader) -> ConfigReader | None:
    for key in ("rope_scaling", "rope_parameters"):
        if read.has(key):
            section = read.section(key)
            # transformers 5 may keep one set per kind of layer; they share the factor.
            for kind in ("full_attention", "global"):
                if section.has(kind):
                    return section.section(kind)
            return section
    return None


def _scaling_or_empty(read: ConfigReader) -> ConfigReader:
    return _scaling(read) or ConfigReader({})
