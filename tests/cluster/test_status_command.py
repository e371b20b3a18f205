"""`ballast status` against a server that says what a test has it say."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from string import Formatter
from typing import Any

import pytest
from commands import Ran, run_here

from cluster.status_report import PHRASES

WELL = {
    "model": "demo",
    "replica": "demo#a1",
    "engine": "fake",
    "state": "ready",
    "rung": "as asked",
}
DEGRADED = {
    **WELL,
    "replica": "demo#b2",
    "rung": "fewer sequences",
    "degraded": {
        "since": 1_700_000_000.0,
        "rung": "fewer sequences",
        "price": "sequences 64 → 32",
        "path": ["as asked"],
        "failed_climbs": 2,
        "next_climb_at": None,
    },
}
GONE = {"model": "other", "state": "unreachable", "reason": "TimeoutError: [bold]late[/bold]"}


class Saying:
    """A server with one answer."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.code = 200
        self.body = b""
        self.asked: list[tuple[str, str | None]] = []

    def say(self, *replicas: Any) -> None:
        models: dict[str, list[Any]] = {}
        for replica in replicas:
            models.setdefault(replica["model"], []).append(replica)
        self.body = json.dumps({"models": models}).encode()


@pytest.fixture
def server() -> Iterator[Saying]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            saying.asked.append((self.path, self.headers["Authorization"]))
            self.send_response(saying.code)
            self.end_headers()
            self.wfile.write(saying.body)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        saying = Saying(f"http://127.0.0.1:{http.server_port}")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield saying
        http.shutdown()
        thread.join()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setenv("COLUMNS", "200")

    def status(*words: str) -> Ran:
        return run_here(monkeypatch, capsys, "status", *words)

    return status


def test_a_server_whose_replicas_serve_as_asked_is_well(server: Saying, run: Any) -> None:
    server.say(WELL, {**WELL, "replica": "demo#b2", "degraded": None})
    ran = run(server.url)
    assert ran.code == 0
    assert "All 2 replicas serve as asked." in ran.out
    assert "▼" not in ran.out


def test_a_degraded_replica_is_marked_with_what_it_gave_up(server: Saying, run: Any) -> None:
    server.say(WELL, DEGRADED)
    ran = run(server.url)
    assert ran.code == 1
    (line,) = [line for line in ran.out.splitlines() if "▼" in line]
    assert "b2" in line
    assert "sequences 64" in line
    assert "(2" in line  # climbs that failed
    assert "1 of 2 replicas are degraded, 0 are not serving." in ran.out


@pytest.mark.parametrize(
    ("next_climb_at", "told"), [(0.0, "when idle"), (1e11, " min"), (None, "room")]
)
def test_the_next_climb_is_told(
    server: Saying, run: Any, next_climb_at: float | None, told: str
) -> None:
    server.say({**DEGRADED, "degraded": {**DEGRADED["degraded"], "next_climb_at": next_climb_at}})
    assert told in run(server.url).out


def test_a_model_that_does_not_answer_is_told_with_its_reason(server: Saying, run: Any) -> None:
    server.say(WELL, GONE)
    ran = run(server.url)
    assert ran.code == 1
    assert "other: TimeoutError: [bold]late[/bold]" in ran.out
    assert "0 of 2 replicas are degraded, 1 are not serving." in ran.out


def test_machines_get_what_the_server_said(server: Saying, run: Any) -> None:
    server.say(DEGRADED)
    ran = run(server.url, "--json")
    assert ran.code == 1
    assert json.loads(ran.out) == json.loads(server.body)


def test_one_model_can_be_asked_with_a_key(
    server: Saying, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.body = json.dumps(WELL).encode()
    monkeypatch.setenv("BALLAST_API_KEY", "secret")
    assert run(f"{server.url}/demo/").code == 0
    assert run(f"{server.url}/demo/status").code == 0
    assert server.asked == [("/demo/status", "Bearer secret")] * 2


def test_chinese_is_chinese(server: Saying, run: Any) -> None:
    server.say(DEGRADED)
    assert "已降级" in run(server.url, "--lang", "zh").out


@pytest.mark.parametrize(
    ("code", "body", "told"),
    [
        (401, b"", "BALLAST_API_KEY"),
        (404, b"", "404"),
        (200, b"<html>", "not the status"),
        (200, b"[]", "not the status"),
        (200, b'{"models": [1]}', "not the status"),
        (200, b'{"models": {"a": [{"model": "a"}]}}', "not the status"),
        (200, b"[" * 100_000, "not the status"),
    ],
)
def test_what_is_no_status_is_one_line(
    server: Saying, run: Any, code: int, body: bytes, told: str
) -> None:
    server.code, server.body = code, body
    assert told in run(server.url).only_error


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://[", "ftp://a"])
def test_a_server_that_is_not_there_is_one_line(run: Any, url: str) -> None:
    assert "can't be asked" in run(url).only_error


def test_a_server_without_models_is_said_so(server: Saying, run: Any) -> None:
    server.say()
    ran = run(server.url)
    assert (ran.code, ran.out.strip()) == (0, "No model is served there.")


@pytest.mark.parametrize("key", PHRASES)
def test_both_languages_have_the_same_placeholders(key: str) -> None:
    def fields(text: str) -> set[str | None]:
        return {field for _, field, _, _ in Formatter().parse(text)} - {None}

    assert fields(PHRASES[key].en) == fields(PHRASES[key].zh)
