from pathlib import Path
from typing import Any

import pytest

from deployments.app import build
from deployments.config import DeviceConfig, ModelConfig

CONFIG = ModelConfig(
    name="demo", model="-", engine="fake", device=DeviceConfig(kind="cpu", memory_gib=1)
)


def built(**changes: Any) -> ModelConfig:
    """The config that the replicas get."""
    application = build(CONFIG.model_copy(update=changes))
    config = application._bound_deployment.init_args[0]
    assert isinstance(config, ModelConfig)
    return config


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas run in other working directories."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = built(model="model", api_keys_file=Path("secrets/keys"))
    assert config.model == str(tmp_path / "model")
    assert config.api_keys_file == tmp_path / "secrets/keys"


def test_names_of_the_hub_and_missing_keys_stay(tmp_path: Path) -> None:
    config = built(model="Qwen/Qwen3-8B")
    assert config.model == "Qwen/Qwen3-8B"
    assert config.api_keys_file is None


def test_a_link_to_the_keys_is_kept(tmp_path: Path) -> None:
    """Kubernetes swaps the link when a secret changes."""
    (tmp_path / "first").write_text("secret")
    (tmp_path / "keys").symlink_to(tmp_path / "first")
    assert built(api_keys_file=tmp_path / "keys").api_keys_file == tmp_path / "keys"
