"""Starts the server as a person would, on ports of its own, and ends it wholly."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
START_S = 240.0
# A prompt with this text ends every engine that has it in its batch, for want of memory.
POISON = "arsenic"


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]
    dashboard: str
    calibration: Path  # of this server alone

    def status(self, model: str) -> dict[str, Any]:
        return httpx.get(f"{self.url}/{model}/status", timeout=30).raise_for_status().json()

    def of_dashboard(self, path: str) -> dict[str, Any]:
        token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray/auth_token"))
        headers = {"Authorization": f"Bearer {token.read_text().strip()}"} if token.exists() else {}
        answer = httpx.get(f"{self.dashboard}{path}", headers=headers, timeout=30)
        return dict(answer.raise_for_status().json())

    def placement_groups(self) -> list[dict[str, Any]]:
        """Those that Ray has made and not removed."""
        found = self.of_dashboard("/api/v0/placement_groups?detail=1")["data"]["result"]["result"]
        return [group for group in found if group["state"] != "REMOVED"]

    def engine_process(self, model: str, name: str) -> int:
        """The id of the engine's process whose name contains `name`, once it is up and measured."""
        for _ in range(200):
            measured = self.status(model)["measured"] or {}
            for process_id in measured.get("process_ids", ()):
                if psutil.pid_exists(process_id) and name in psutil.Process(process_id).name():
                    return int(process_id)
            time.sleep(0.1)
        raise AssertionError(f"no process named {name!r} in the status of {model}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def write_config(folder: Path, document: Mapping[str, Any]) -> Path:
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(dict(document)), encoding="utf-8")
    return path


def dev_config(port: int, **changes: Mapping[str, Any]) -> dict[str, Any]:
    """serve_configs/dev.yaml on another port, with changed args for some models."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "serve_configs/dev.yaml").read_text())
    document["http_options"]["port"] = port
    for application in document["applications"]:
        application["args"].update(changes.get(application["name"].replace("-", "_"), {}))
    return document


@contextmanager
def running(
    command: list[str], document: Mapping[str, Any], models: tuple[str, ...]
) -> Iterator[Server]:
    """`command` and the config's path, in a Ray cluster of its own; ready when all models are."""
    # Ray's sockets live below it, and a Unix socket's path has 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="bt"))
    port = int(document["http_options"]["port"])
    log = folder / "server.log"
    haproxy = folder / "haproxy"
    haproxy.mkdir()
    env = {
        **os.environ,
        "RAY_TMPDIR": str(folder),
        "RAY_ADDRESS": "local",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
        "BALLAST_CALIBRATION": str(folder / "calibration.jsonl"),
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, str(write_config(folder, document))],
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell that runs the tests in the background has them ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, models, log)
            calibration = Path(env["BALLAST_CALIBRATION"])
            yield Server(url, log, process, _dashboard(log), calibration)
        finally:
            _end(process, str(folder))
    shutil.rmtree(folder, ignore_errors=True)


def beside_python(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _wait(process: subprocess.Popen[bytes], url: str, models: tuple[str, ...], log: Path) -> None:
    deadline = time.monotonic() + START_S
    waiting = list(models)
    while waiting:
        tail = log.read_text(errors="replace")[-3000:]
        assert process.poll() is None, f"the server ended: {tail}"
        assert time.monotonic() < deadline, f"{waiting} did not start: {tail}"
        try:
            answer = httpx.get(f"{url}/{waiting[0]}/health", timeout=5)
            if answer.status_code == 200:
                waiting.pop(0)
                continue
        except httpx.TransportError:
            pass
        time.sleep(0.5)


def _dashboard(log: Path) -> str:
    found = re.search(r"dashboard at .*?(http://[\w.:]+)", log.read_text(errors="replace"))
    return found[1] if found else ""


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Interrupt it as Ctrl-C does; then nothing that carries our folder is left."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(60)
        stopped_by_itself = True
    except subprocess.TimeoutExpired:
        stopped_by_itself = False
    deadline = time.monotonic() + 10
    while (left := _of_folder(mark)) and stopped_by_itself and time.monotonic() < deadline:
        time.sleep(0.2)
    for straggler in left:
        with suppress(psutil.NoSuchProcess):
            straggler.kill()
    process.wait(10)
    # `serve run` alone may take longer than anybody waits; `ballast serve` may not.
    if "ballast" in str(process.args):
        assert stopped_by_itself
        assert not left, f"left behind: {left}"


def _of_folder(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get("RAY_TMPDIR") == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
