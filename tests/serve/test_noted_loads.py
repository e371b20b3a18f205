"""What real engines took is in the calibration file, with nobody doing anything for it."""

import time

import pytest
from server import Server

from vram.calibration import Load, read_calibration

pytestmark = pytest.mark.serve


def loads_of(server: Server, engine: str) -> list[Load]:
    """As soon as the replica has measured, which it does by itself."""
    deadline = time.monotonic() + 60
    while True:
        found = [x for x in read_calibration(server.calibration).loads if x.kind.engine == engine]
        if found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def test_a_load_of_vllm_is_noted_with_its_own_lines_about_its_cache(server: Server) -> None:
    loads = loads_of(server, "vllm")
    assert loads
    load = loads[0]
    settings = server.status("demo")["plan"]["settings"]
    assert load.measured["kv_cache_tokens"] == load.estimated["kv_cache_tokens"]
    assert load.measured["kv_cache"] == pytest.approx(
        settings["kv_cache_memory_bytes"], abs=6 << 20
    )
    assert load.measured["device_use"] > 0
    assert load.engine_version[0].isdigit()
    assert server.status("demo")["measured"]["reported"]["kv_cache_tokens"] > 0


def test_a_load_of_transformers_is_noted_with_its_ram(server: Server) -> None:
    loads = loads_of(server, "transformers")
    assert loads
    assert loads[0].measured["device_use"] > 0
    assert loads[0].kind.card == "CPU"
