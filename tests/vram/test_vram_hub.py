from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from vram.errors import Invalid
from vram.hub import LARGEST_CONFIG_BYTES, read_config

CONFIGS = Path(__file__).parent / "configs"


def test_a_local_folder_is_read() -> None:
    assert read_config(str(CONFIGS / "qwen2.5-7b"))["hidden_size"] == 3584


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"hidden_size": 64', "not JSON"),
        (b"[1, 2]", "not an object"),
        (b"\xff\xfe", "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b" " * (LARGEST_CONFIG_BYTES + 1), "above"),
    ],
    ids=["truncated", "list", "not-utf8", "deep", "huge"],
)
def test_a_bad_file_is_one_clear_error(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(Invalid, match=said):
        read_config(str(tmp_path))


def test_a_folder_without_a_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"config\.json cannot be read"):
        read_config(str(tmp_path))


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "a b", "x/y/z", "", "../.."])
def test_what_is_neither_folder_nor_name_is_refused_without_the_network(source: str) -> None:
    with pytest.raises(Invalid):
        read_config(source)


def test_the_cache_is_asked_before_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(name: str, file: str, *, local_files_only: bool = False) -> str:
        assert local_files_only
        return str(CONFIGS / "qwen2.5-7b" / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    assert read_config("Qwen/Qwen2.5-7B")["vocab_size"] == 152064


def _not_cached(*args: object, local_files_only: bool = False, **options: object) -> str:
    assert local_files_only, "it was downloaded"
    raise LocalEntryNotFoundError("not cached")


def test_a_huge_file_on_the_hub_is_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = SimpleNamespace(size=LARGEST_CONFIG_BYTES + 1)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", _not_cached)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: huge)
    with pytest.raises(Invalid, match="at most"):
        read_config("Qwen/Qwen2.5-7B")


@pytest.mark.parametrize("error", [OSError("no route"), HTTPError("no such host")])
def test_no_network_says_what_to_do(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", _not_cached)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    with pytest.raises(Invalid, match="give a local folder"):
        read_config("Qwen/Qwen2.5-7B")
