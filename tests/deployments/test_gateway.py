import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_openai_harness import client_of

from deployments.config import RESERVED_NAMES, GatewayConfig
from deployments.errors import Invalid
from deployments.gateway import Gateway, build

KEY = {"authorization": "Bearer secret"}


class LonelyGateway(Gateway):
    """Of one model, whose replicas say what they are told to."""

    said: tuple[Any, ...] = ()

    async def models(self) -> tuple[str, ...]:
        return ("demo",)

    async def _broadcast(self, model: str, method: str) -> list[Any]:
        return list(self.said)


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = await LonelyGateway(GatewayConfig()).__serve_build_asgi_app__()
    async with client_of(app) as client:
        yield client


def error_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize(
    "path", ["/", "/nowhere", "/v2/models", "/openapi.json", "/docs", "/v1", "/health/"]
)
async def test_an_unknown_path_is_an_openai_error(
    client: httpx.AsyncClient, method: str, path: str
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == 404
    error = error_of(answer)
    assert error["type"] == "not_found_error"
    assert error["message"] == f"There is no {path} here."


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("GET", "/api/v1/inference/stream", "POST"),
        ("PUT", "/api/v1/inference/stream", "POST"),
        ("DELETE", "/v1/models/demo", "GET"),
        ("PUT", "/status", "GET"),
        ("POST", "/metrics", "GET"),
    ],
)
async def test_a_wrong_method_is_an_openai_error_that_names_the_right_one(
    client: httpx.AsyncClient, method: str, path: str, allowed: str
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed
    error = error_of(answer)
    assert error["type"] == "invalid_request_error"
    assert error["message"] == f"{path} takes {allowed}, not {method}."


async def test_an_unknown_model_is_still_named(client: httpx.AsyncClient) -> None:
    for path in ("/v1/completions", "/other/v1/completions", "/other/api/v1/inference/stream"):
        answer = await client.post(path, json={"model": "other"})
        assert answer.status_code == 404
        assert error_of(answer)["code"] == "model_not_found"


async def test_a_path_of_the_gateway_is_not_taken_for_a_model(client: httpx.AsyncClient) -> None:
    answer = await client.get("/api/v1/models")
    assert answer.status_code == 404
    assert error_of(answer)["message"] == "There is no /api/v1/models here."


async def test_no_model_can_be_named_like_a_path_of_the_gateway() -> None:
    app: Any = await Gateway(GatewayConfig()).__serve_build_asgi_app__()
    while hasattr(app, "_app"):
        app = app._app
    names = {route.path.split("/")[1] for route in app.routes}
    assert names - {"{model}"} <= RESERVED_NAMES


async def test_metrics_of_several_replicas_are_one_text() -> None:
    gateway = LonelyGateway(GatewayConfig())
    text = '# TYPE a gauge\na{{replica="{}"}} 1.0\n'
    gateway.said = (text.format("x"), text.format("y"), {"state": "unreachable"})
    async with client_of(await gateway.__serve_build_asgi_app__()) as client:
        answer = await client.get("/metrics")
    (family,) = text_string_to_metric_families(answer.text)
    assert [sample.labels for sample in family.samples] == [{"replica": "x"}, {"replica": "y"}]


async def test_keys_are_read_when_it_starts(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    with pytest.raises(Invalid, match="can't be read"):
        Gateway(GatewayConfig(api_keys_file=keys))
    keys.write_text("secret")
    gateway = LonelyGateway(GatewayConfig(api_keys_file=keys))
    keys.unlink()
    async with client_of(await gateway.__serve_build_asgi_app__()) as client:
        assert (await client.get("/status")).status_code == 401
        assert json.loads((await client.get("/status", headers=KEY)).text) == {
            "models": {"demo": []}
        }


def test_the_builder_makes_the_file_of_keys_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    application = build(GatewayConfig(api_keys_file=Path("keys")))
    assert application._bound_deployment.init_args[0].api_keys_file == tmp_path / "keys"
    application = build(GatewayConfig())
    assert application._bound_deployment.init_args[0].api_keys_file is None


class Front:
    """Ray's front and a model behind it: deaths first, then the replica's own answer."""

    def __init__(self, *deaths: httpx.Response | Exception, status: int = 200) -> None:
        self.asked = 0
        self._deaths = list(deaths)
        self._status = status

    async def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        if self._deaths:
            death = self._deaths.pop(0)
            if isinstance(death, Exception):
                raise death
            return death
        return httpx.Response(
            self._status, headers={"x-response-time": "1ms"}, stream=httpx.ByteStream(b"said")
        )


async def passed(front: Front, monkeypatch: pytest.MonkeyPatch) -> httpx.Response:
    monkeypatch.setattr("deployments.gateway._front_url", lambda: "http://front")
    monkeypatch.setattr("deployments.gateway._PAUSES_S", (0.0, 0.0, 0.0))
    gateway = LonelyGateway(GatewayConfig())
    gateway._client = httpx.AsyncClient(transport=httpx.MockTransport(front.answer))
    async with client_of(await gateway.__serve_build_asgi_app__()) as client:
        return await client.post("/v1/completions", json={"model": "demo"})


async def test_a_request_whose_replica_died_before_its_answer_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    front = Front(httpx.Response(500, text="Internal Server Error"), httpx.ReadError("reset"))
    answer = await passed(front, monkeypatch)
    assert (answer.status_code, answer.text, front.asked) == (200, "said", 3)


@pytest.mark.parametrize("status", [400, 500, 503])
async def test_an_error_of_the_replica_itself_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    front = Front(status=status)
    answer = await passed(front, monkeypatch)
    assert (answer.status_code, front.asked) == (status, 1)


async def test_a_model_that_stays_away_is_said_to_be_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    front = Front(*[httpx.ConnectError("refused")] * 9)
    answer = await passed(front, monkeypatch)
    assert (answer.status_code, front.asked) == (503, 4)
    assert answer.headers["retry-after"] == "5"


async def test_a_replica_that_does_not_answer_hides_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broadcast:
        def results(self, *, timeout_s: float, return_exceptions: bool = False) -> list[Any]:
            gone = TimeoutError("no word in 5 s")
            if not return_exceptions:
                raise gone
            return [{"state": "ready"}, gone]

    handle = SimpleNamespace(broadcast=lambda method: Broadcast())
    monkeypatch.setattr("deployments.gateway.serve.get_deployment_handle", lambda *_, **__: handle)

    class OfOneModel(Gateway):
        async def models(self) -> tuple[str, ...]:
            return ("demo",)

    app = await OfOneModel(GatewayConfig()).__serve_build_asgi_app__()
    async with client_of(app) as client:
        (ready, gone) = (await client.get("/status")).json()["models"]["demo"]
        assert (await client.get("/metrics")).status_code == 200
    assert ready == {"state": "ready"}
    assert gone["state"] == "unreachable"
    assert "no word in 5 s" in gone["reason"]
