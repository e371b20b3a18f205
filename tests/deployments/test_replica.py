from pathlib import Path

import pytest

from deployments.config import DeviceConfig, ModelConfig
from deployments.errors import Invalid
from deployments.planning import make_plan
from deployments.replica import Replica


class Unborn(Replica):
    def __del__(self) -> None:
        """Ray Serve would await Replica's."""


async def test_keys_are_read_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def load(*_: object, **__: object) -> None:
        raise AssertionError("the engine was started")

    monkeypatch.setattr("deployments.replica.start_serving", load)
    config = ModelConfig(
        name="demo",
        model="-",
        engine="fake",
        device=DeviceConfig(kind="cpu", memory_gib=1),
        api_keys_file=tmp_path / "none",
    )
    replica = object.__new__(Unborn)
    with pytest.raises(Invalid, match=r"api_keys_file .* can't be read"):
        await replica.__init__(config, *make_plan(config))
