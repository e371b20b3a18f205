"""The shape of the model that a command names: from its config.json and its files' headers."""

from pathlib import Path
from typing import Any

from vram.checkpoint import read_folder, with_checkpoint
from vram.errors import Invalid
from vram.hub import HUB_NAME, read_config
from vram.hub_files import checkpoint_on_hub
from vram.model import ModelShape
from vram.model_names import approximate_parameters, approximate_weight_bytes
from vram.units import gib

# Beyond it the file system itself refuses a path (PATH_MAX).
LONGEST_NAME = 4095


def read_shape(source: str) -> tuple[ModelShape, tuple[str, ...]]:
    """A local folder or a Hub name; with what could not be looked at, in words."""
    if len(source) > LONGEST_NAME or "\0" in source:
        raise Invalid(f"{source[:100]!r} is neither a folder nor a Hub name", "model")
    shape = ModelShape.from_config(_config(source))
    folder = Path(source).expanduser()
    if folder.is_dir():
        checkpoint = read_folder(folder)
        return (with_checkpoint(shape, checkpoint) if checkpoint else shape), ()
    try:
        checkpoint = checkpoint_on_hub(source)
    except Invalid as error:
        # The config was in the cache; without the headers its own sizes stand.
        return shape, (str(error),)
    return (with_checkpoint(shape, checkpoint) if checkpoint else shape), ()


def _config(source: str) -> dict[str, Any]:
    """A name that the Hub does not answer for still says something; but not that it fits."""
    try:
        return read_config(source)
    except Invalid as error:
        if not HUB_NAME.fullmatch(source) or Path(source).exists():
            raise
        try:
            found = approximate_parameters(source)
        except Invalid:
            raise error from None
        size = gib(approximate_weight_bytes(source, "bfloat16"))
        raise Invalid(
            f"{error}. By its name alone: {found.parameters / 1e9:.1f} billion parameters, {size} "
            "of weights in bfloat16, off by up to 10 % (--by-name)",
            "model",
        ) from None
