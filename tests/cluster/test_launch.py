from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import launch
from cluster.launch import StartFailed, check, next_step
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


class Starting:
    """A server whose models come up; what its gateway does, `failed` says at the second look."""

    def __init__(self, failed: str | None, exit_code: int | None = None) -> None:
        self.process = SimpleNamespace(poll=lambda: self._exit_code, returncode=exit_code)
        self._failed = failed
        self._exit_after = exit_code
        self._exit_code: int | None = None
        self._looks = 0

    def failed_application(self) -> str | None:
        self._looks += 1
        if self._looks > 1:
            self._exit_code = self._exit_after
            return self._failed
        return None


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (Starting("gateway failed to start: no keys"), "no keys"),
        (Starting(None, exit_code=1), "exit code 1"),
        (Starting(None), "the gateway did not start within 0 s"),
    ],
)
def test_a_gateway_that_does_not_come_up_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, server: Starting, said: str
) -> None:
    def is_ready(url: str) -> bool:
        return url.endswith("/demo/health")

    rests = iter(range(100))  # then StopIteration
    limit_s = 0.0 if "within" in said else 600.0
    monkeypatch.setattr(launch, "_is_ready", is_ready)
    monkeypatch.setattr(launch.time, "sleep", lambda _: next(rests))
    with pytest.raises(StartFailed, match=said):
        launch._wait(server, LOCAL, limit_s, lambda line: None)  # type: ignore[arg-type]
