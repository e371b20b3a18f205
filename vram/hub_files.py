"""Reads parts of a Hugging Face repository's files: the first bytes, never the weights."""

from collections.abc import Callable

from vram.checkpoint import (
    INDEX,
    LARGEST_INDEX_BYTES,
    SINGLE,
    Checkpoint,
    read_header,
    read_index,
)
from vram.errors import Invalid

TIMEOUT_S = 10.0

# (name of a file, offset, count) -> that part; None where there is no such file.
Fetch = Callable[[str, int, int], bytes | None]


def checkpoint_on_hub(name: str, fetch: Fetch | None = None) -> Checkpoint | None:
    """The index's sum, or the header of the only file; None where there are neither."""
    fetch = fetch or _fetcher(name)
    index = fetch(INDEX, 0, LARGEST_INDEX_BYTES + 1)
    if index is not None:
        if len(index) > LARGEST_INDEX_BYTES:
            raise Invalid(
                f"{INDEX} of {name} is above {LARGEST_INDEX_BYTES} bytes and is not read", "model"
            )
        return read_index(index, INDEX)
    if fetch(SINGLE, 0, 8) is None:
        return None
    tensors = read_header(lambda offset, count: fetch(SINGLE, offset, count) or b"", SINGLE)
    return Checkpoint(
        total_bytes=sum(tensor.size_bytes for tensor in tensors), tensors=tuple(tensors)
    )


def _fetcher(name: str) -> Fetch:
    """Range requests; a server that ignores the range is not read past the count either."""
    import httpx
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers

    def fetch(file: str, offset: int, count: int) -> bytes | None:
        headers = {**build_hf_headers(), "Range": f"bytes={offset}-{offset + count - 1}"}
        received = bytearray()
        try:
            with (
                httpx.Client(timeout=TIMEOUT_S, follow_redirects=True) as client,
                client.stream("GET", hf_hub_url(name, file), headers=headers) as response,
            ):
                if response.status_code in (401, 403, 404):
                    return None
                response.raise_for_status()
                skip = offset if response.status_code == 200 else 0  # the range was ignored
                for chunk in response.iter_bytes():
                    received += chunk
                    if len(received) >= skip + count:
                        break
        except httpx.HTTPError as error:
            raise Invalid(
                f"{file} of {name} is not to be had from the Hub ({type(error).__name__})", "model"
            ) from error
        return bytes(received[skip : skip + count])

    return fetch
