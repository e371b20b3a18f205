"""What a life of an engine ended of, read from all that its processes left. Starts none."""

import multiprocessing
import signal
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.engines.vllm import VLLMEngine, exit_codes_of
from deployments.last_words import LastWord
from deployments.oom import Cause, Death, death_from_exception, death_of
from deployments.phases import Phase
from vram.shortage import Shortage, ShortageKind
from vram.units import GIB

# As vLLM 0.29 says them.
ENGINE_DEAD = RuntimeError(
    "EngineCore encountered an issue. See stack trace (above) for the cause."
)
WORKER_DIED = "Worker proc VllmWorker-1 died unexpectedly (exit code: {}), shutting down executor."
OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"


def raised(*errors: str, **more: Any) -> LastWord:
    return LastWord(process_id=7, errors=errors, **more)


def logged(text: str) -> LastWord:
    return LastWord(process_id=7, logged=text)


EXECUTOR_FAILED = raised("builtins.RuntimeError: Executor failed.")
RAN_OUT = raised(
    OUT_OF_MEMORY, is_fatal=True, phase=Phase.EXECUTE_MODEL, requests=("a", "b"), free_bytes=GIB
)


def start_failed(exit_codes: dict[str, int]) -> RuntimeError:
    return RuntimeError(
        "Engine core initialization failed. See root cause above. "
        f"Failed core proc(s): {exit_codes}"
    )


def test_engine_core_killed_from_outside_was_killed() -> None:
    death = death_of("running", error=ENGINE_DEAD, exit_codes=(-9,))
    assert (death.cause, death.message) == (Cause.KILLED, "ended by signal 9")


def test_a_bus_error_is_a_full_shared_memory() -> None:
    death = death_of("running", error=ENGINE_DEAD, exit_codes=(-signal.SIGBUS,))
    assert death.cause is Cause.SHARED_MEMORY
    assert "/dev/shm" in death.message


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
    words = [logged(WORKER_DIED.format(-9)), EXECUTOR_FAILED]
    for exit_codes in ((1,), ()):
        death = death_of("running", words=words, error=ENGINE_DEAD, exit_codes=exit_codes)
        assert death.cause is Cause.KILLED


@pytest.mark.parametrize(
    "line",
    [WORKER_DIED.format(None), "RayWorkerProc rank=1 died unexpectedly, shutting down executor."],
)
def test_a_worker_that_is_gone_without_a_word_was_killed(line: str) -> None:
    """vLLM looked for the exit code of a killed worker too early, on a machine with TP 2."""
    death = death_of("running", words=[logged(line), EXECUTOR_FAILED], error=ENGINE_DEAD)
    assert death.cause is Cause.KILLED
    bug = raised("builtins.ValueError: a bug")
    death = death_of("running", words=[bug, logged(line), EXECUTOR_FAILED], error=ENGINE_DEAD)
    assert (death.cause, death.message) == (Cause.OTHER, bug.errors[0])


def test_a_worker_killed_beside_another_was_killed() -> None:
    """The other one hears only that its peer is gone."""
    peer = raised("builtins.RuntimeError: Connection closed by peer [127.0.0.1]", is_fatal=True)
    words = [peer, logged(WORKER_DIED.format(-9)), EXECUTOR_FAILED]
    assert death_of("running", words=words, error=ENGINE_DEAD).cause is Cause.KILLED


def test_what_a_peer_saw_of_a_death_is_not_taken_for_its_cause() -> None:
    """Also where the peer was faster to write."""
    peer = raised("builtins.RuntimeError: Connection closed by peer [127.0.0.1]", is_fatal=True)
    death = death_of("running", words=[peer, RAN_OUT, EXECUTOR_FAILED], error=ENGINE_DEAD)
    assert (death.cause, death.requests) == (Cause.DEVICE_MEMORY, ("a", "b"))


@pytest.mark.parametrize(
    "exit_codes", [{"EngineCore": -9}, {"EngineCore_DP0": 1, "EngineCore_DP1": -9}]
)
def test_engine_core_killed_while_it_loads_was_killed(exit_codes: dict[str, int]) -> None:
    death = death_of("loading", error=start_failed(exit_codes))
    assert (death.cause, death.phase) == (Cause.KILLED, "loading")


def test_memory_outranks_the_signal_that_followed() -> None:
    words = [RAN_OUT, logged(WORKER_DIED.format(-9)), EXECUTOR_FAILED]
    death = death_of("running", words=words, error=ENGINE_DEAD, exit_codes=(-6,))
    assert death.cause is Cause.DEVICE_MEMORY
    assert death.message == OUT_OF_MEMORY


def test_a_death_has_the_batch_and_the_numbers_of_the_step_that_died() -> None:
    death = death_of("running", words=[RAN_OUT, EXECUTOR_FAILED], error=ENGINE_DEAD)
    assert death.requests == ("a", "b")
    assert death.shortage == Shortage(
        kind=ShortageKind.RUN_TIME, asked_bytes=2 * GIB, free_bytes=GIB
    )
    assert str(death).startswith("device_memory (run_time) while running: torch.OutOfMemoryError")


def test_what_the_message_says_is_not_replaced_by_what_was_measured_later() -> None:
    text = f"{OUT_OF_MEMORY}. GPU 0 has a total capacity of 80.00 GiB of which 0.50 GiB is free."
    death = death_of("running", words=[replace(RAN_OUT, errors=(text,))])
    assert death.shortage is not None
    assert (death.shortage.free_bytes, death.shortage.total_bytes) == (GIB // 2, 80 * GIB)


def test_what_is_free_on_the_card_is_not_taken_for_what_is_free_for_the_cache() -> None:
    word = raised("builtins.ValueError: No available memory for the cache blocks.", free_bytes=GIB)
    death = death_of("loading", words=[word], error=start_failed({"EngineCore": 1}))
    assert death.shortage == Shortage(kind=ShortageKind.NO_CACHE_BLOCKS)


def test_the_first_cause_counts_and_not_what_another_worker_said_next() -> None:
    """An illegal access makes every later call fail, some of them for memory."""
    first = raised("torch.AcceleratorError: CUDA error: illegal memory access", is_fatal=True)
    death = death_of("running", words=[first, RAN_OUT], error=ENGINE_DEAD)
    assert (death.cause, death.message) == (Cause.OTHER, first.errors[0])
    weights = replace(RAN_OUT, phase=Phase.LOAD_MODEL)
    death = death_of("loading", words=[weights, RAN_OUT])
    assert death.shortage is not None
    assert death.shortage.kind is ShortageKind.WEIGHTS


def test_an_error_that_somebody_handled_long_before_is_not_the_cause() -> None:
    handled = raised("builtins.ValueError: a bad request", logged="Invocation of a method failed")
    words = [handled, raised(OUT_OF_MEMORY, phase=Phase.EXECUTE_MODEL), EXECUTOR_FAILED]
    assert death_of("running", words=words, error=ENGINE_DEAD).is_memory
    words = [handled, logged(WORKER_DIED.format(-9)), EXECUTOR_FAILED]
    assert death_of("running", words=words, error=ENGINE_DEAD).cause is Cause.KILLED


def test_memory_that_was_only_logged_counts() -> None:
    words = [logged("Failed to load model - not enough GPU memory. (CUDA out of memory)")]
    death = death_of("loading", words=words, error=start_failed({"EngineCore": 1}))
    assert death.cause is Cause.DEVICE_MEMORY


@pytest.mark.parametrize("exit_codes", [(), (0,), (1,)])
def test_an_exception_without_a_signal_keeps_its_message(exit_codes: tuple[int, ...]) -> None:
    words = [raised("builtins.ValueError: a bug"), logged(WORKER_DIED.format(1)), EXECUTOR_FAILED]
    error = start_failed({"EngineCore": 1})
    death = death_of("running", words=words, error=error, exit_codes=exit_codes)
    assert (death.cause, death.message) == (Cause.OTHER, "builtins.ValueError: a bug")


def test_an_engine_that_left_nothing_died_of_what_its_parent_says() -> None:
    assert death_of("loading", error=ValueError("a bug")).message == "builtins.ValueError: a bug"
    assert "Engine core" in death_of("loading", error=start_failed({"EngineCore": 1})).message
    assert death_of("running", exit_codes=(1,)).message == "ended with exit code 1"


def test_settings_that_the_engine_refuses_have_a_cause_of_their_own() -> None:
    error = ValueError("FP8 KV cache is not supported by the Triton attention backend")
    assert death_of("loading", error=error).cause is Cause.REFUSED


def test_ray_s_own_memory_error_is_the_host_s_and_torch_s_within_ray_s_is_the_device_s() -> None:
    ray_own = type("OutOfMemoryError", (Exception,), {"__module__": "ray.exceptions"})
    torch_own = type("OutOfMemoryError", (Exception,), {"__module__": "torch"})
    assert death_from_exception(ray_own("Task was killed"), "running").cause is Cause.HOST_MEMORY
    task_error: Any = type("RayTaskError(OutOfMemoryError)", (Exception,), {})("remote")
    task_error.cause = torch_own("")
    assert death_from_exception(task_error, "running").cause is Cause.DEVICE_MEMORY


def test_an_error_that_was_raised_from_none_hides_what_was_handled() -> None:
    error = ValueError("a bug")
    error.__context__ = RuntimeError(OUT_OF_MEMORY)
    assert death_from_exception(error, "running").is_memory
    error.__suppress_context__ = True
    assert death_from_exception(error, "running").cause is Cause.OTHER


async def test_a_killed_process_is_waited_for_before_vllm_looks_for_it() -> None:
    heard: list[str] = []
    process = SimpleNamespace(join=lambda timeout: heard.append("joined"), exitcode=-9)
    core = SimpleNamespace(
        resources=SimpleNamespace(engine_manager=SimpleNamespace(processes=[process])),
        shutdown=lambda timeout: heard.append("shut down"),
    )
    engine = VLLMEngine(lambda settings: pytest.fail("nothing is started"))
    engine._core = core
    await engine.stop()
    assert heard == ["joined", "shut down"]


async def test_a_step_that_cannot_be_handed_on_is_heard_of_as_a_death() -> None:
    """Else nobody reads on, and every stream stands still."""

    class Listener:
        deaths: list[Death] = []  # noqa: RUF012

        def stepped(self, step: Any) -> None:
            raise TypeError("a bug above")

        def died(self, death: Death) -> None:
            self.deaths.append(death)

    async def get_output_async() -> Any:
        return SimpleNamespace(outputs=())

    core = SimpleNamespace(get_output_async=get_output_async, resources=client().resources)
    engine = VLLMEngine(lambda settings: pytest.fail("nothing is started"))
    listener = Listener()
    await engine._read(core, listener)
    assert [death.cause for death in listener.deaths] == [Cause.OTHER]
    assert "a bug above" in listener.deaths[0].message
