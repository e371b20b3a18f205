"""What the box inside an engine's process writes, and what is read of it."""

import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from deployments.engines import black_box, vllm_plugin, vllm_wake
from deployments.engines.black_box import BlackBox
from deployments.last_words import LastWord, read_lines
from deployments.oom import death_of
from deployments.phases import Phase, phase_of
from vram.shortage import ShortageKind

BATCH = SimpleNamespace(num_scheduled_tokens={"request-1": 7, "request-2": 1})


class OutOfMemoryError(RuntimeError):
    """As torch has it, by its name and module."""


OutOfMemoryError.__module__ = "torch"
SHORT = "CUDA out of memory. Tried to allocate 2.00 GiB"


class Worker:
    """As an executor of vLLM sees one. It fails where it is told to."""

    def __init__(self, fails_in: str) -> None:
        self.fails_in = fails_in

    def load_model(self) -> None:
        self._at("load_model")

    def determine_available_memory(self) -> int:
        self.profile_run()
        return 1

    def profile_run(self) -> None:
        self._at("profile_run")

    def initialize_from_config(self, config: object) -> None:
        self._at("initialize_from_config")

    def compile_or_warm_up_model(self) -> None:
        self.capture_model()
        self.warmup_kernels()

    def capture_model(self) -> None:
        self._at("capture_model")

    def warmup_kernels(self) -> None:
        self.execute_model(SimpleNamespace(num_scheduled_tokens={"_warmup_0_": 1}))

    def execute_model(self, scheduler_output: Any) -> str:
        warming_up = "_warmup_0_" in scheduler_output.num_scheduled_tokens
        self._at("warming up" if warming_up else "execute_model")
        return "output"

    def sample_tokens(self, grammar_output: object) -> None:
        self._at("sample_tokens")

    def _at(self, place: str) -> None:
        if place == self.fails_in:
            raise OutOfMemoryError(SHORT)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "box.jsonl"


def words_in(file: Path) -> tuple[LastWord, ...]:
    return read_lines(file.read_text().splitlines())


def run_until_it_fails(worker: Any) -> None:
    worker.load_model()
    worker.determine_available_memory()
    worker.initialize_from_config(None)
    worker.compile_or_warm_up_model()
    assert worker.execute_model(BATCH) == "output"
    worker.sample_tokens(None)


@pytest.mark.parametrize(
    ("fails_in", "phase", "kind", "requests"),
    [
        ("load_model", Phase.LOAD_MODEL, ShortageKind.WEIGHTS, ()),
        ("profile_run", Phase.PROFILING, ShortageKind.ACTIVATIONS, ()),
        (
            "initialize_from_config",
            Phase.KV_ALLOCATION,
            ShortageKind.CACHE_ALLOCATION,
            (),
        ),
        ("capture_model", Phase.GRAPH_CAPTURE, ShortageKind.GRAPH_CAPTURE, ()),
        ("warming up", Phase.WARM_UP, ShortageKind.WARM_UP, ()),
        (
            "execute_model",
            Phase.EXECUTE_MODEL,
            ShortageKind.RUN_TIME,
            ("request-1", "request-2"),
        ),
        (
            "sample_tokens",
            Phase.EXECUTE_MODEL,
            ShortageKind.RUN_TIME,
            ("request-1", "request-2"),
        ),
    ],
)
def test_an_error_out_of_a_worker_is_written_once_with_its_phase_and_batch(
    file: Path, fails_in: str, phase: Phase, kind: ShortageKind, requests: tuple[str, ...]
) -> None:
    worker = Worker(fails_in)
    BlackBox(str(file)).watch(worker, "cuda")
    with pytest.raises(OutOfMemoryError):
        run_until_it_fails(worker)
    (word,) = words_in(file)
    assert word == LastWord(
        process_id=os.getpid(),
        errors=(f"torch.OutOfMemoryError: {SHORT}",),
        is_fatal=True,
        phase=phase,
        device_type="cuda",
        requests=requests,
    )
    death = death_of("loading", words=[word])
    assert death.shortage is not None
    assert (death.shortage.kind, death.requests) == (kind, requests)


def test_a_worker_that_works_writes_nothing(file: Path) -> None:
    worker = Worker("nowhere")
    BlackBox(str(file)).watch(worker)
    run_until_it_fails(worker)
    assert not file.exists()


def test_what_vllm_logs_of_an_error_that_is_written_already_is_not_written_again(
    file: Path,
) -> None:
    box = BlackBox(str(file))
    logger = logging.Logger("vllm")
    logger.addHandler(box)
    worker = Worker("execute_model")
    box.watch(worker)
    try:
        worker.execute_model(BATCH)
    except OutOfMemoryError:
        logger.exception("WorkerProc hit an exception.")
    assert len(words_in(file)) == 1


def test_logged_errors_are_written_with_the_phase_that_the_stack_shows(file: Path) -> None:
    def get_kv_cache_configs() -> None:
        raise ValueError("No available memory for the cache blocks.")

    logger = logging.Logger("vllm")
    logger.addHandler(BlackBox(str(file)))
    logger.warning("not an error")
    logger.error("Worker proc %s died", "w-1")
    try:
        get_kv_cache_configs()
    except ValueError:
        logger.exception("EngineCore failed to start.")
    line, error = words_in(file)
    assert (line.logged, line.errors) == ("Worker proc w-1 died", ())
    assert error.errors == ("builtins.ValueError: No available memory for the cache blocks.",)
    assert (error.phase, error.is_fatal) == (Phase.KV_PLANNING, False)
    assert error.logged == "EngineCore failed to start."


def test_a_wrapped_error_is_written_with_all_that_it_wraps(file: Path) -> None:
    box = BlackBox(str(file))
    try:
        try:
            raise OutOfMemoryError(SHORT)
        except OutOfMemoryError as inner:
            raise RuntimeError("the backend failed") from inner
    except RuntimeError as error:
        box.write_exception(error)
    (word,) = words_in(file)
    assert word.errors == (
        "builtins.RuntimeError: the backend failed",
        f"torch.OutOfMemoryError: {SHORT}",
    )
    assert death_of("running", words=[word]).message == word.errors[1]


def test_a_box_whose_folder_is_gone_does_not_raise(tmp_path: Path) -> None:
    worker = Worker("load_model")
    BlackBox(str(tmp_path / "gone" / "box.jsonl")).watch(worker)
    with pytest.raises(OutOfMemoryError):
        worker.load_model()


def test_the_box_leaves_no_file_open(file: Path) -> None:
    box = BlackBox(str(file))
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        box.write_exception(RuntimeError("x"))
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert len(words_in(file)) == 3


def test_the_card_s_numbers_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch(lambda: (100, 800)))
    sizes = black_box.device_sizes()
    assert sizes == {"free_bytes": 100, "total_bytes": 800, "reserved_bytes": 30}


def test_a_card_that_answers_nothing_any_more_has_no_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> tuple[int, int]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(sys.modules, "torch", fake_torch(fails))
    assert black_box.device_sizes() == {}


def fake_torch(mem_get_info: Any) -> ModuleType:
    module: Any = ModuleType("torch")
    module.cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        mem_get_info=mem_get_info,
        memory_reserved=lambda: 50,
        memory_allocated=lambda: 20,
    )
    return module  # type: ignore[no-any-return]


def test_a_line_that_was_cut_off_is_read_as_it_is() -> None:
    whole = LastWord(process_id=1, errors=("torch.OutOfMemoryError: CUDA",)).line()
    first, second = read_lines([whole, whole[:30], ""])
    assert first.errors == ("torch.OutOfMemoryError: CUDA",)
    assert second.logged == whole[:30]
    assert read_lines([]) == ()


def test_a_line_of_another_version_is_read_as_text() -> None:
    (word,) = read_lines([json.dumps({"process_id": 1, "phase": "a new one"})])
    assert "a new one" in word.logged


def test_the_cache_is_planned_between_a_profile_and_an_allocation() -> None:
    assert phase_of(["_initialize_kv_caches"]) is Phase.KV_PLANNING
    assert phase_of(["_initialize_kv_caches", "determine_available_memory"]) is Phase.PROFILING
    assert phase_of(["_initialize_kv_caches", "initialize_from_config"]) is Phase.KV_ALLOCATION
    assert phase_of(["main"]) is None


class Installed:
    """Whether the plugin did anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.did: list[str] = []
        for owner, name in (
            (vllm_plugin, "_end_with_parent"),
            (vllm_plugin, "note_names"),
            (vllm_plugin, "_resume_requests"),
            (vllm_wake, "install"),
            (black_box, "_watch_workers"),
        ):
            monkeypatch.setattr(owner, name, lambda *_, name=name: self.did.append(name))


def test_the_plugin_does_nothing_outside_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = Installed(monkeypatch)
    monkeypatch.delenv(vllm_plugin.BLACK_BOX, raising=False)
    vllm_plugin.register()
    assert installed.did == []


def test_the_plugin_does_nothing_where_vllm_only_looks_at_a_model(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    """With a cold cache vLLM runs its registry as a program, in the environment of the engine."""
    installed = Installed(monkeypatch)
    monkeypatch.setenv(vllm_plugin.BLACK_BOX, str(file))
    main = SimpleNamespace(__spec__=SimpleNamespace(name="vllm.model_executor.models.registry"))
    monkeypatch.setitem(sys.modules, "__main__", main)  # type: ignore[arg-type]
    vllm_plugin.register()
    assert installed.did == []


def test_the_plugin_installs_itself_once(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    installed = Installed(monkeypatch)
    monkeypatch.setenv(vllm_plugin.BLACK_BOX, str(file))
    monkeypatch.delenv(vllm_plugin.SHARE_CORES, raising=False)
    logger = logging.getLogger("vllm")
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, logger, "handlers", list(logger.handlers))
        vllm_plugin.register()
        vllm_plugin.register()
        assert installed.did.count("_watch_workers") == 1
        assert installed.did.count("_resume_requests") == 1


def test_a_full_disk_does_not_take_the_place_of_what_happened() -> None:
    box = BlackBox("/dev/full")  # opens, and takes nothing
    worker = Worker("load_model")
    box.watch(worker)
    with pytest.raises(OutOfMemoryError):
        worker.load_model()
    box.emit(logging.makeLogRecord({"msg": "an error", "levelno": logging.ERROR}))
