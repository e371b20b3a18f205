"""Fetches a model's config.json: from a folder, the Hugging Face cache, or the Hub. No weights."""

import re
from pathlib import Path
from typing import Any

from vram.errors import Invalid
from vram.json_file import parsed, read_bounded
from vram.units import MIB

# Real ones are 1 to 40 kB; a file above this is not a config, and is not read.
LARGEST_CONFIG_BYTES = 4 * MIB
HUB_TIMEOUT_S = 10.0

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9_.-]{1,96})?")


def read_config(source: str) -> dict[str, Any]:
    """The config.json of a local folder or of a Hugging Face name, the cache before the network."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _parsed(folder / "config.json")
    if folder.is_file():
        kind = "GGUF files are not read: " if folder.suffix.lower() == ".gguf" else ""
        raise Invalid(f"{source!r} is a file; {kind}give a folder with config.json", "model")
    if source.startswith((".", "/", "~")):
        raise Invalid(f"There is no folder {source!r}", "model")
    if not HUB_NAME.fullmatch(source):
        raise Invalid(
            f"{source[:100]!r} is neither a folder nor a Hugging Face name like owner/model",
            "model",
        )
    return _parsed(_from_hub(source))


def _from_hub(name: str) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # httpx.HTTPError and OSError: huggingface_hub changes its HTTP library between releases.
    unreachable: tuple[type[Exception], ...] = (LocalEntryNotFoundError, *HfHubHTTPError.__bases__)
    try:
        return Path(hf_hub_download(name, "config.json", local_files_only=True))
    except LocalEntryNotFoundError:
        pass  # not in the cache: ask the Hub
    except HFValidationError as error:
        raise Invalid(f"{name!r} is not a Hugging Face name: {error}", "model") from error
    try:
        # It also fails at once without a network, where the download retries for 23 s.
        found = get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_TIMEOUT_S)
        if found.size is not None and found.size > LARGEST_CONFIG_BYTES:
            raise Invalid(
                f"config.json of {name} is {found.size} bytes; at most {LARGEST_CONFIG_BYTES} "
                "are read",
                "model",
            )
        return Path(hf_hub_download(name, "config.json", etag_timeout=HUB_TIMEOUT_S))
    except unreachable as error:
        raise Invalid(
            f"config.json of {name} is neither in the cache nor to be had from the Hub "
            f"({type(error).__name__}): give a local folder, or check the name, the network "
            "and, for a gated model, HF_TOKEN",
            "model",
        ) from error


def _parsed(path: Path) -> dict[str, Any]:
    return parsed(read_bounded(path, LARGEST_CONFIG_BYTES), str(path))
