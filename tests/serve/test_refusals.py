"""What `ballast serve` refuses before it starts anything."""

import socket
import subprocess
from pathlib import Path

import pytest
from server import beside_python, dev_config, write_config

pytestmark = pytest.mark.serve


def refuse(config: Path) -> str:
    ended = subprocess.run(
        [beside_python("ballast"), "serve", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "HOME": str(config.parent), "COLUMNS": "500"},
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    return ended.stderr


def test_a_taken_port_is_named_with_its_process(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        message = refuse(write_config(tmp_path, dev_config(port)))
    import os

    assert f"port {port} is taken by process {os.getpid()}" in message
    assert "pytest" in message or "python" in message


def test_a_model_that_can_not_fit_is_refused_with_what_to_change(tmp_path: Path) -> None:
    document = dev_config(1, demo={"device": {"kind": "cpu", "memory_gib": 0.5}})
    assert "demo" in refuse(write_config(tmp_path, document))


def test_a_typo_is_named(tmp_path: Path) -> None:
    document = dev_config(1)
    document["http_option"] = document.pop("http_options")
    assert "http_option" in refuse(write_config(tmp_path, document))
