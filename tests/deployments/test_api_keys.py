import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
from guarded import APP, check_error
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Message
from test_openai_harness import client_of

from deployments.errors import Invalid
from deployments.guards.api_keys import ApiKeys, KeySet, load_api_keys

KEYS = KeySet.of(["first-key", "second-key"])


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer second-key"},
        {"x-api-key": "second-key"},
        {"x-api-key": "first-key", "authorization": "Bearer placeholder"},
    ],
)
async def test_a_known_key_opens_the_door(headers: dict[str, str]) -> None:
    async with client_of(ApiKeys(APP, KEYS)) as client:
        response = await client.get("/v1/models", headers=headers)
        assert response.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer other"},
        {"authorization": "Basic first-key"},
        {"authorization": "first-key"},
        {"authorization": "Bearer"},
        {"x-api-key": "first-ke"},
        {"x-api-key": ""},
        {"x-api-key": "first-key second-key"},
        {"x-api-key": b"\xff\xfe"},
        {"x-api-key": "sha256:" + hashlib.sha256(b"first-key").hexdigest()},
    ],
)
async def test_any_other_key_is_a_401(headers: dict[str, Any]) -> None:
    async with client_of(ApiKeys(APP, KEYS)) as client:
        for path in ("/v1/models", "/status"):
            check_error(await client.get(path, headers=headers), 401, "invalid_api_key")


async def test_health_and_metrics_are_open_unless_configured_otherwise() -> None:
    async with client_of(ApiKeys(APP, KEYS)) as client:
        assert (await client.get("/health")).status_code == 200
    async with client_of(ApiKeys(APP, KEYS, open_paths=("/status",))) as client:
        assert (await client.get("/status")).status_code == 200
        assert (await client.get("/health")).status_code == 401


async def test_an_open_path_is_open_below_a_prefix_and_nowhere_else() -> None:
    mounted = Starlette(routes=[Mount("/demo", ApiKeys(APP, KEYS))])
    async with client_of(mounted) as client:
        assert (await client.get("/demo/health")).status_code == 200
        assert (await client.get("/demo/v1/health")).status_code == 401


async def test_without_keys_the_door_is_open() -> None:
    async with client_of(ApiKeys(APP, KeySet())) as client:
        assert (await client.get("/v1/models")).status_code == 200


async def test_a_websocket_needs_a_key_too() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    await ApiKeys(APP, KEYS)(scope, _nothing, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(known: bytes, given: bytes) -> bool:
        compared.append(known)
        return known == given

    monkeypatch.setattr("deployments.guards.api_keys.hmac.compare_digest", compare)
    for key in (b"first-key", b"second-key", b"none"):
        compared.clear()
        KEYS.accepts(key)
        assert compared == list(KEYS.digests)


def test_keys_come_from_a_file_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    digest = hashlib.sha256(b"third").hexdigest()
    file.write_text(f"# ours\nfirst\n\n  second  \nsha256:{digest}\nключ\n")
    keys = load_api_keys(file, {"BALLAST_API_KEYS": "ignored"})
    assert len(keys) == 4
    assert all(keys.accepts(key.encode()) for key in ("first", "second", "third", "ключ"))
    assert not any(map(keys.accepts, (b"", b"# ours", b"ignored")))


def test_keys_come_from_the_environment_without_a_file() -> None:
    keys = load_api_keys(None, {"BALLAST_API_KEYS": "first\nsecond"})
    assert (len(keys), keys.accepts(b"second")) == (2, True)
    assert not load_api_keys(None, {})


@pytest.mark.parametrize("content", [None, b"", b"# none\n", b"\xff\xfe", b"sha256:12\n"])
def test_a_file_without_a_key_does_not_open_the_door(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(Invalid):
        load_api_keys(file, {"BALLAST_API_KEYS": "first"})


async def test_no_key_is_in_a_log_or_a_repr(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with client_of(ApiKeys(APP, KEYS)) as client:
        await client.get("/v1/models", headers={"x-api-key": "wrong-key"})
    digests = [digest.hex() for digest in KEYS.digests]
    text = repr(KEYS) + repr(vars(ApiKeys(APP, KEYS))) + caplog.text
    assert not any(secret in text for secret in ("first-key", "wrong-key", *digests))
    assert not any(repr(digest)[2:-1] in text for digest in KEYS.digests)


async def _nothing() -> Message:
    raise AssertionError("nothing to receive")
