import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.launch import check_ports
from cluster.ports import Holder, holder_of, taken_of
from cluster.serve_config import ServeConfig
from deployments.config import DeviceConfig, GatewayConfig, ModelConfig
from deployments.errors import Invalid

FIRST = "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"
END = "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"
PAGES = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)


@contextmanager
def listener() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield int(listening.getsockname()[1])


@pytest.fixture
def taken_port() -> Iterator[int]:
    with listener() as port:
        yield port


@pytest.fixture
def env() -> dict[str, str]:
    """Every port but that of the config, at places where nobody listens."""
    variables = (*PAGES, FIRST)
    free = {name: str(port) for name, port in zip(variables, free_ports(4), strict=True)}
    return free | {END: str(int(free[FIRST]) + 3)}


def free_port() -> int:
    """One that `env` does not use."""
    return free_ports(5)[-1]


def free_ports(number: int) -> list[int]:
    """Together with three after each, so that a range may begin there."""
    found: list[int] = []
    port = 20_000
    while len(found) < number:
        if not taken_of(range(port, port + 4)):
            found.append(port)
        port += 4
    return found


def serve_config(port: int, *, num_replicas: int = 1) -> ServeConfig:
    model = ModelConfig(
        name="demo",
        model="-",
        engine="fake",
        device=DeviceConfig(kind="cpu", memory_gib=1),
        num_replicas=num_replicas,
    )
    return ServeConfig(
        path=Path("serve.yaml"),
        host="127.0.0.1",
        port=port,
        models=(model,),
        gateway=GatewayConfig(),
    )


def test_the_holder_of_a_port_is_named(taken_port: int) -> None:
    holder = holder_of(taken_port)
    assert holder is not None
    assert holder.process_id == os.getpid()
    assert f"port {taken_port} is taken by process {os.getpid()} (" in str(holder)
    assert f"`kill {os.getpid()}`" in str(holder)
    assert "left over" not in str(holder)


def test_a_free_port_has_no_holder() -> None:
    assert holder_of(free_port()) is None


def test_another_process_is_named_with_its_command() -> None:
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1]);"
    with subprocess.Popen(
        [sys.executable, "-uc", code + "input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        holder = holder_of(int(process.stdout.readline()))
        process.communicate("\n")
    assert holder is not None
    assert holder.process_id == process.pid
    assert "import socket" in holder.command


def test_a_process_that_the_kernel_does_not_name_is_not_to_be_killed() -> None:
    """`kill 0` would end the reader's own shell."""
    sentence = str(Holder(port=8000, process_id=None))
    assert sentence == "port 8000 is taken by a process of another user: take another port"


def test_an_orphaned_haproxy_is_called_left_over() -> None:
    holder = Holder(port=8000, process_id=4711, command="haproxy -db", orphaned=True)
    assert "(haproxy -db, left over from a server that was killed)" in str(holder)


def test_the_taken_ports_of_a_range_are_counted_once(taken_port: int) -> None:
    assert taken_of(range(taken_port, taken_port + 1)) == {taken_port}
    assert taken_of(range(taken_port, taken_port)) == frozenset()


def test_free_ports_are_fine(env: dict[str, str]) -> None:
    check_ports(serve_config(free_port()), env, haproxy=True)


def test_a_taken_port_of_the_config_is_refused(env: dict[str, str], taken_port: int) -> None:
    with pytest.raises(Invalid, match=rf"port {taken_port} is taken .* \(http_options\.port\)$"):
        check_ports(serve_config(taken_port), env, haproxy=False)


@pytest.mark.parametrize("name", PAGES)
def test_the_ports_that_haproxy_brings_are_looked_at(
    env: dict[str, str], taken_port: int, name: str
) -> None:
    config, taken = serve_config(free_port()), {**env, name: str(taken_port)}
    with pytest.raises(Invalid, match=rf"port {taken_port} is taken .* \({name}\)$"):
        check_ports(config, taken, haproxy=True)
    check_ports(config, taken, haproxy=False)


@pytest.mark.parametrize("name", PAGES)
def test_one_port_for_two_things_is_refused(env: dict[str, str], name: str) -> None:
    port = int(env[name])
    with pytest.raises(Invalid, match=rf"^http_options\.port and {name} are both {port}: "):
        check_ports(serve_config(port), env, haproxy=True)


@pytest.mark.parametrize("given", ["abc", "0", "-1", "65536", "9" * 5000, ""])
def test_a_variable_that_is_no_port_is_refused(env: dict[str, str], given: str) -> None:
    with pytest.raises(Invalid, match=rf"^{PAGES[2]} is .*; a port is 1 to 65535$"):
        check_ports(serve_config(free_port()), {**env, PAGES[2]: given}, haproxy=True)


def test_each_replica_needs_a_free_port_of_the_range(env: dict[str, str]) -> None:
    """Three ports: the gateway takes one, so there is room for two replicas."""
    check_ports(serve_config(free_port(), num_replicas=2), env, haproxy=True)
    with pytest.raises(Invalid, match=rf"each of 4 replicas .* 3 are free: set {END} higher"):
        check_ports(serve_config(free_port(), num_replicas=3), env, haproxy=True)
    check_ports(serve_config(free_port(), num_replicas=3), env, haproxy=False)


def test_taken_ports_of_the_range_do_not_count(env: dict[str, str], taken_port: int) -> None:
    around = {**env, FIRST: str(taken_port), END: str(taken_port + 1)}
    with pytest.raises(Invalid, match=r"each of 2 replicas .* 0 are free"):
        check_ports(serve_config(free_port()), around, haproxy=True)
