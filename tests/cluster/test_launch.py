from dataclasses import replace
from pathlib import Path

import pytest

from cluster.launch import check, next_step
from cluster.serve_config import ServeConfig
from deployments.config import DeviceConfig, GatewayConfig, ModelConfig

MODEL = ModelConfig(
    name="demo", model="-", engine="fake", device=DeviceConfig(kind="cpu", memory_gib=1)
)
LOCAL = ServeConfig(
    path=Path("serve.yaml"),
    host="127.0.0.1",
    port=8000,
    models=(MODEL,),
    gateway=GatewayConfig(),
)
OPEN = replace(LOCAL, host="0.0.0.0")
GUARDED = replace(
    OPEN,
    models=(MODEL.model_copy(update={"api_keys_file": Path("keys")}),),
    gateway=GatewayConfig(api_keys_file=Path("keys")),
)


def warnings_of(config: ServeConfig, env: dict[str, str] | None = None) -> list[str]:
    lines: list[str] = []
    check(config, lines.append, env or {})
    return [line for line in lines if line.startswith("warning: ")]


def test_a_server_that_anybody_may_ask_is_warned_about() -> None:
    (warning,) = warnings_of(OPEN)
    assert "0.0.0.0" in warning
    assert "the gateway, demo would answer without an API key" in warning


def test_only_what_is_open_is_named() -> None:
    (warning,) = warnings_of(replace(OPEN, gateway=GUARDED.gateway))
    assert "and demo would answer" in warning


@pytest.mark.parametrize("config", [LOCAL, GUARDED], ids=["loopback", "keys"])
def test_nothing_is_said_of_a_server_that_is_closed(config: ServeConfig) -> None:
    assert warnings_of(config) == []


def test_keys_of_the_environment_close_it() -> None:
    assert warnings_of(OPEN, {"BALLAST_API_KEYS": "secret"}) == []


def test_the_next_step_has_a_place_for_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BALLAST_API_KEYS", raising=False)
    assert "Authorization" not in next_step(OPEN)
    assert "-H 'Authorization: Bearer KEY' -H 'Content-Type" in next_step(GUARDED)
