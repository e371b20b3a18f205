"""What an engine of vLLM died of, read from what its processes left. Starts none."""

import json
import logging
import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.engines.vllm import death_of, exit_codes_of, last_words
from deployments.engines.vllm_plugin import BlackBox
from deployments.oom import Cause

# As vLLM 0.29 says them.
ENGINE_DEAD = RuntimeError(
    "EngineCore encountered an issue. See stack trace (above) for the cause."
)
WORKER_DIED = "Worker proc VllmWorker-1 died unexpectedly (exit code: {}), shutting down executor."
EXECUTOR_FAILED = "builtins.RuntimeError: Executor failed."
OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"


def start_failed(exit_codes: dict[str, int]) -> RuntimeError:
    return RuntimeError(
        "Engine core initialization failed. See root cause above. "
        f"Failed core proc(s): {exit_codes}"
    )


def test_engine_core_killed_from_outside_was_killed() -> None:
    death = death_of(ENGINE_DEAD, "running", "", (-9,))
    assert (death.cause, death.message) == (Cause.KILLED, "ended by signal 9")


def test_the_exit_code_of_a_killed_process_is_found_where_vllm_keeps_it() -> None:
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    assert exit_codes_of(client(processes=[process])) == ()
    process.kill()
    process.join()
    assert exit_codes_of(client(processes=[process])) == (-9,)


def test_a_client_without_processes_of_its_own_has_no_exit_codes() -> None:
    """With data parallelism in Ray it has actors."""
    assert exit_codes_of(client()) == ()
    assert exit_codes_of(SimpleNamespace(resources=SimpleNamespace(engine_manager=None))) == ()


def client(**manager: Any) -> Any:
    return SimpleNamespace(resources=SimpleNamespace(engine_manager=SimpleNamespace(**manager)))


def test_a_worker_killed_from_outside_was_killed() -> None:
    """EngineCore then ends by an exception of its own, with exit code 1."""
    words = f"{EXECUTOR_FAILED}\n{WORKER_DIED.format(-9)}"
    assert death_of(ENGINE_DEAD, "running", words, (1,)).cause is Cause.KILLED
    assert death_of(ENGINE_DEAD, "running", words).cause is Cause.KILLED


@pytest.mark.parametrize(
    "exit_codes", [{"EngineCore": -9}, {"EngineCore_DP0": 1, "EngineCore_DP1": -9}]
)
def test_engine_core_killed_while_it_loads_was_killed(exit_codes: dict[str, int]) -> None:
    death = death_of(start_failed(exit_codes), "loading", "")
    assert (death.cause, death.phase) == (Cause.KILLED, "loading")


def test_memory_outranks_the_signal_that_followed() -> None:
    words = f"{OUT_OF_MEMORY}\n{WORKER_DIED.format(-9)}"
    death = death_of(ENGINE_DEAD, "running", words, (-6,))
    assert death.cause is Cause.DEVICE_MEMORY
    assert death.message == OUT_OF_MEMORY


def test_memory_that_was_only_logged_counts() -> None:
    words = "Failed to load model - not enough GPU memory. (original error: CUDA out of memory)"
    death = death_of(start_failed({"EngineCore": 1}), "loading", words)
    assert death.cause is Cause.DEVICE_MEMORY


@pytest.mark.parametrize("exit_codes", [(), (0,), (1,)])
def test_an_exception_without_a_signal_keeps_its_message(exit_codes: tuple[int, ...]) -> None:
    words = f"builtins.ValueError: a bug\n{WORKER_DIED.format(1)}"
    death = death_of(start_failed({"EngineCore": 1}), "running", words, exit_codes)
    assert (death.cause, death.message) == (Cause.OTHER, "builtins.ValueError: a bug")


def test_the_black_box_keeps_exceptions_before_other_errors(tmp_path: Path) -> None:
    file = tmp_path / "box.jsonl"
    logger = logging.Logger("vllm")
    logger.addHandler(BlackBox(str(file)))
    logger.warning("not an error")
    logger.error("Worker proc %s died", "w-1")
    for message in ("first", "second"):
        try:
            raise RuntimeError(message)
        except RuntimeError:
            logger.exception("EngineCore encountered a fatal error.")
    lines = file.read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[1])["frames"] == [
        "test_the_black_box_keeps_exceptions_before_other_errors"
    ]
    assert last_words(lines).splitlines() == [
        "builtins.RuntimeError: first",
        "builtins.RuntimeError: second",
        "Worker proc w-1 died",
    ]


def test_a_line_that_was_cut_off_is_read_as_it_is() -> None:
    whole = json.dumps({"logged": "x", "class": "torch.OutOfMemoryError", "message": "CUDA"})
    assert last_words([whole, whole[:30]]) == f"torch.OutOfMemoryError: CUDA\n{whole[:30]}"
    assert last_words([]) == ""
