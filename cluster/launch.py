"""`ballast serve`: checks a config, starts `serve run` on it, and says when it can be talked to."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from cluster.ports import holder_of, taken_of
from cluster.serve_config import ServeConfig
from deployments.errors import BallastError, Invalid
from deployments.planning import make_plan
from deployments.supervisor import State
from vram.units import gib

# What a body may have so that HAProxy can still find the model in it; longer ones take the gateway.
_HAPROXY_BUFFER_BYTES = 128 * 1024
# Ray's variables and defaults. The third is its Python proxy behind HAProxy, for a model without a
# replica.
_HAPROXY_PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
}
_FIRST_REPLICA_PORT = ("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", 30000)
_END_OF_REPLICA_PORTS = ("RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT", 31000)  # not one of them
_DASHBOARD = re.compile(r"dashboard at .*?(?P<url>http://[\w.:]+)")
_STOP_S = 20.0

Say = Callable[[str], None]


class StartFailed(BallastError):
    """The server did not come up."""


def check(config: ServeConfig, say: Say, env: Mapping[str, str] = os.environ) -> None:
    """Plan every model. Raises `Invalid` for one that can't fit."""
    without_keys = config.without_keys(env)
    if without_keys and not config.is_local:
        say(
            f"warning: other machines can reach {config.host}, and {', '.join(without_keys)} "
            f"would answer without an API key: set api_keys_file there, or "
            f"http_options.host: 127.0.0.1"
        )
    for model in config.models:
        if model.device.kind == "cuda" and model.device.name is None:
            say(
                f"{model.name}: {model.engine}; the cluster's cards decide when Ray is up, and "
                "`ballast plan` says what they would (device.name is not given)"
            )
            continue
        plan, placed = make_plan(model)
        where = " + ".join(str(dict(bundle)) for bundle in placed.bundles)
        say(
            f"{model.name}: {model.engine} on {plan.device.name}, "
            f"{gib(plan.estimate.total_bytes)} planned, context {plan.settings.max_model_len}, "
            f"bundles {where}"
        )


def environment(base: Mapping[str, str], *, haproxy: bool) -> dict[str, str]:
    """What Ray has to be started with, so that HTTP ends in the replica."""
    env = dict(base)
    # A raylet that ends takes the processes of its workers along: no engine is left behind.
    env.setdefault("RAY_process_group_cleanup_enabled", "1")
    env.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray runs workers at nice 15: an engine would lose its cores to any other process.
    env.setdefault("RAY_worker_niceness", "0")
    # Ten times a second it would look for work that comes a few times a day.
    env.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "1")
    # `uv run` would make Ray copy the repository and build an environment for every worker.
    env.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if haproxy:
        env["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        env["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"
        threads = max(1, min(4, (os.cpu_count() or 1) // 2))  # Ray's 4 are too many for 2 cores
        env.setdefault("RAY_SERVE_HAPROXY_NBTHREAD", str(threads))
        env.setdefault("RAY_SERVE_HAPROXY_TUNE_BUFSIZE", str(_HAPROXY_BUFFER_BYTES))
        # A replica that dies before its first byte: another one is asked, or Ray's proxy, which
        # waits for one. Ray's default is careful of requests that change something; none does here.
        env.setdefault("RAY_SERVE_HAPROXY_RETRY_ON", "conn-failure empty-response")
        env.setdefault("RAY_SERVE_HAPROXY_RETRIES", "10")
        env.setdefault("RAY_SERVE_HAPROXY_BINARY_PATH", _beside_python("ballast-haproxy"))
    return env


def check_ports(config: ServeConfig, env: Mapping[str, str] = os.environ, *, haproxy: bool) -> None:
    """Raise `Invalid` naming the process that holds a port we need."""
    needed = {"http_options.port": config.port}
    if haproxy:
        needed |= {name: _port(env, name, port) for name, port in _HAPROXY_PORTS.items()}
    for setting, port in needed.items():
        other = next(name for name, same in needed.items() if same == port)
        if other != setting:
            raise Invalid(f"{other} and {setting} are both {port}: change one", setting)
        holder = holder_of(port)
        if holder is not None:
            raise Invalid(f"{holder} ({setting})", setting)
    if haproxy:
        _check_replica_ports(config.num_replicas, env)


def _check_replica_ports(num_replicas: int, env: Mapping[str, str]) -> None:
    """Ray passes over the taken ones of a range, so there have to be enough of the others."""
    first, end = _port(env, *_FIRST_REPLICA_PORT), _port(env, *_END_OF_REPLICA_PORTS)
    ports = range(first, end)
    num_free = len(ports) - len(taken_of(ports))
    if num_free < num_replicas:
        setting = _END_OF_REPLICA_PORTS[0]
        raise Invalid(
            f"each of {num_replicas} replicas needs a port, and of {first} to {end - 1} "
            f"{num_free} are free: set {setting} higher",
            setting,
        )


def _port(env: Mapping[str, str], name: str, default: int) -> int:
    given = env.get(name, str(default))
    if not given.isdecimal() or not 1 <= int(given[:6]) <= 65535:
        raise Invalid(f"{name} is {given!r}; a port is 1 to 65535", name)
    return int(given)


def serve(config: ServeConfig, *, haproxy: bool, timeout_s: float, say: Say) -> int:
    """Run in the foreground until interrupted; the exit code of `serve run`."""
    check_ports(config, haproxy=haproxy)
    check(config, say)
    began_s = time.monotonic()
    # Also where a shell has started us in the background, with SIGINT ignored; Ray inherits that.
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    server = _Server(config, haproxy=haproxy)
    try:
        _wait(server, config, timeout_s, say)
        say(f"ready after {time.monotonic() - began_s:.0f} s")
        say(next_step(config))
        return server.process.wait()
    except KeyboardInterrupt:
        say("stopping")
        return 0
    finally:
        server.stop()


class _Server:
    """`serve run` in a process group of its own; what it prints goes on to our output."""

    def __init__(self, config: ServeConfig, *, haproxy: bool) -> None:
        self.process = subprocess.Popen(
            [_beside_python("serve"), "run", str(config.path)],
            env=environment(os.environ, haproxy=haproxy),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._dashboard: str | None = None
        threading.Thread(target=self._pass_on, daemon=True).start()

    def failed_application(self) -> str | None:
        """What Ray's dashboard says of an application that it has given up."""
        if self._dashboard is None:
            return None
        url = f"{self._dashboard}/api/serve/applications/"
        try:
            answer = httpx.get(url, headers=_ray_token(), timeout=5.0)
            answer.raise_for_status()
        except httpx.HTTPError:
            return None  # not up yet, or going down: the caller looks again
        for name, application in answer.json()["applications"].items():
            if application["status"] == "DEPLOY_FAILED":
                deployments = application["deployments"].values()
                messages = [application["message"], *(d["message"] for d in deployments)]
                return f"{name} failed to start: {_sentence(messages)}"
        return None

    def stop(self) -> None:
        """Let `serve run` shut its Ray cluster down for a while; end what is left of its family."""
        family = _family(self.process.pid)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        # Serve drains its replicas for longer than anybody waits who has pressed Ctrl-C.
        _, left = psutil.wait_procs(family, timeout=_STOP_S)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_STOP_S)
        self.process.wait()

    def _pass_on(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            print(line, end="", flush=True)
            found = _DASHBOARD.search(line)
            if found is not None:
                self._dashboard = found["url"]


def _wait(server: _Server, config: ServeConfig, limit_s: float, say: Say) -> None:
    deadline_s = time.monotonic() + limit_s
    base = f"http://127.0.0.1:{config.port}"
    waiting = {model.name: f"{base}/{model.name}/health" for model in config.models}
    if config.gateway is not None:
        waiting["the gateway"] = f"{base}/health"
    while waiting:
        if server.process.poll() is not None:
            raise StartFailed(f"`serve run` ended with exit code {server.process.returncode}")
        if time.monotonic() > deadline_s:
            raise StartFailed(f"{', '.join(waiting)} did not start within {limit_s:.0f} s")
        for name, url in list(waiting.items()):
            if _is_ready(url):
                del waiting[name]
                say(f"{name} is ready" + (f", waiting for {', '.join(waiting)}" if waiting else ""))
        failed = server.failed_application()
        if failed is not None:
            raise StartFailed(failed)
        time.sleep(0.5)


def _is_ready(url: str) -> bool:
    try:
        answer = httpx.get(url, timeout=2.0)
        return answer.status_code == 200 and answer.json()["status"] in ("ok", State.READY.value)
    except (httpx.TransportError, ValueError, KeyError):
        return False


def _ray_token() -> dict[str, str]:
    """Ray's dashboard wants the token that Ray made for this user, unless RAY_AUTH_MODE says no."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray/auth_token"))
    token = os.environ.get("RAY_AUTH_TOKEN") or (path.read_text() if path.exists() else "")
    return {"Authorization": f"Bearer {token.strip()}"} if token else {}


def _sentence(messages: list[str]) -> str:
    """Ray wraps what we said in tracebacks: our own error if there is one, else the last line."""
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith(("deployments.", "vram.", "placement."))]
    return (ours or lines or ["no message"])[-1]


def next_step(config: ServeConfig) -> str:
    model = config.models[0].name
    key = "" if model in config.without_keys(os.environ) else "-H 'Authorization: Bearer KEY' "
    return (
        f"try: curl -N http://127.0.0.1:{config.port}/v1/chat/completions {key}"
        f"-H 'Content-Type: application/json' -d '"
        f'{{"model": "{model}", "stream": true, "max_tokens": 64, '
        f'"messages": [{{"role": "user", "content": "Hello"}}]}}\''
    )


def _family(process_id: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(process_id)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []


def _interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _beside_python(name: str) -> str:
    """A command of this environment, also when it is not on the PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise StartFailed(f"the command {name!r} is not installed beside {sys.executable}")
    return found
