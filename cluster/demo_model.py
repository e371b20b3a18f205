"""Writes the demo model: a tiny Qwen2 from a seed, with tokenizer and chat template; no download.

Its text is noise made of syllables. What it is built for is a greedy answer that no float noise
can change (`demo_weights`), so that a replayed stream can be compared with an undisturbed one,
token by token. It does not end its answer by itself, unless `<|stop_soon|>` stands in the prompt:
then it says `<|im_end|>` when that token is 40 places back.
"""

import hashlib
import json
import os
from pathlib import Path

from cluster import demo_config, demo_tokens

MARKER = "ballast_demo.json"


def build_demo_model(folder: Path, seed: int = 0) -> None:
    """Write the model to `folder`, unless this version of it already lies there.

    Two processes may do so at once: they write the same bytes, each file by a rename.
    """
    marker: dict[str, object] = {"version": _version(), "seed": seed}
    if _is_complete(folder, marker):
        return
    from safetensors.numpy import save

    from cluster.demo_weights import make_weights

    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).unlink(missing_ok=True)
    vocabulary, merges = demo_tokens.make_vocabulary()
    files = {
        "config.json": _as_json(demo_config.config(vocabulary)),
        "generation_config.json": _as_json(demo_config.generation_config(vocabulary)),
        "tokenizer.json": _as_json(demo_tokens.tokenizer(vocabulary, merges)),
        "tokenizer_config.json": _as_json(demo_tokens.tokenizer_config(demo_config.MAX_POSITIONS)),
        "model.safetensors": save(make_weights(vocabulary, seed), metadata={"format": "pt"}),
    }
    for name, content in files.items():
        _write(folder / name, content)
    _write(folder / MARKER, _as_json({**marker, "files": sorted(files)}))


def _version() -> str:
    """Of the code that makes it."""
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("demo_*.py")))
    return hashlib.sha256(code).hexdigest()[:16]


def _is_complete(folder: Path, marker: dict[str, object]) -> bool:
    try:
        found = json.loads((folder / MARKER).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return marker.items() <= found.items() and all(
        (folder / name).exists() for name in found["files"]
    )


def _write(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(path)


def _as_json(value: dict[str, object]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
