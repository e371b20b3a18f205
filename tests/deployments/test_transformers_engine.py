import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from samples import SETTINGS

from cluster.demo_model import build_demo_model
from deployments.engines import transformers as engine_module
from deployments.engines.protocol import LoadFailed, Sampling, Step, TokenRequest
from deployments.engines.transformers import TransformersEngine
from deployments.errors import EngineDied, EngineMissing, Invalid, LadderExhausted, UnknownOption
from deployments.faults import Fault
from deployments.keeper import Keeper
from deployments.oom import Cause, Death
from deployments.policy import fixed
from deployments.restarts import RestartLimit
from deployments.supervisor import Supervisor
from vram.ladder import Rung
from vram.shortage import Shortage, ShortageKind
from vram.units import GIB

pytest.importorskip("torch")
pytest.importorskip("transformers")

on_ray = [
    pytest.mark.ray,
    # Ray leaves sockets and the handles of its log files to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
]
RESTARTS = RestartLimit(max_restarts=2, window_s=600.0)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Any]:
    import ray

    ray.init(num_cpus=2, _temp_dir="/tmp/rt", include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("models") / "demo"
    build_demo_model(folder)
    return str(folder)


class Clients:
    """A listener, or what is above a keeper: the tokens that each request has got so far."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.death: Death | None = None
        self.died_at_s = 0.0

    def stepped(self, step: Step) -> None:
        for delta in step.outputs:
            self.tokens.setdefault(delta.request_id, []).extend(delta.new_token_ids)
            if delta.finished:
                self.finished.add(delta.request_id)

    def died(self, death: Death) -> None:
        self.death, self.died_at_s = death, time.monotonic()

    def gave_up(self, error: LadderExhausted) -> None:
        raise error

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens.values()))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.005)


@pytest.fixture
def clients() -> Clients:
    return Clients()


@pytest.fixture
async def engine(local_ray: Any, model_path: str) -> AsyncIterator[TransformersEngine]:
    engine = TransformersEngine(model_path)
    yield engine
    await engine.stop()


def request(number: int, max_tokens: int = 100) -> TokenRequest:
    return TokenRequest(
        request_id=f"request-{number}",
        prompt_token_ids=tuple(range(number + 1, number + 70)),
        sampling=Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
    )


def undisturbed(model_path: str, requests: Sequence[TokenRequest]) -> dict[str, list[int]]:
    """What the batch says in this process, without an actor."""
    from transformers import AutoModelForCausalLM

    from deployments.engines.transformers_batch import Batch

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
    batch = Batch(model, max_num_seqs=16, max_num_batched_tokens=2048, max_model_len=2048)
    for each in requests:
        batch.add(each)
    clients = Clients()
    while batch.has_work:
        clients.stepped(batch.step())
    return clients.tokens


async def process_id(engine: TransformersEngine) -> int:
    (pid,) = (await engine.measure()).process_ids
    return pid


def keeper_of(
    engine: TransformersEngine, clients: Clients, rungs: tuple[Rung, ...]
) -> Keeper[TokenRequest]:
    supervisor = Supervisor(rungs[0], fixed(lambda _: rungs), RESTARTS)
    return Keeper(
        "demo-hf", engine, supervisor, on_step=clients.stepped, on_give_up=clients.gave_up
    )


def rungs_of(*max_num_seqs: int) -> tuple[Rung, ...]:
    return tuple(
        Rung(
            name=f"{number} at once",
            settings=replace(SETTINGS, max_num_seqs=number),
            price="",
            skipped_reason=None,
        )
        for number in max_num_seqs
    )


class TestOnRay:
    pytestmark = on_ray

    async def test_tokens_come_and_are_those_of_the_batch(
        self, engine: TransformersEngine, clients: Clients, model_path: str
    ) -> None:
        asked = [request(number) for number in range(4)]
        await engine.start(SETTINGS, clients)
        for each in asked:
            await engine.generate(each, ())
        await clients.until(lambda: len(clients.finished) == 4)
        assert clients.tokens == undisturbed(model_path, asked)

    async def test_it_measures_its_process(
        self, engine: TransformersEngine, clients: Clients
    ) -> None:
        await engine.start(SETTINGS, clients)
        measured = await engine.measure()
        assert measured.resident_bytes > 100 << 20
        assert measured.device_bytes == 0
        assert psutil.pid_exists(measured.process_ids[0])

    async def test_no_client_notices_a_killed_actor(
        self, engine: TransformersEngine, clients: Clients, model_path: str
    ) -> None:
        asked = [request(number, max_tokens=200) for number in range(16)]
        expected = undisturbed(model_path, asked)
        keeper = keeper_of(engine, clients, rungs_of(16))
        await keeper.start()
        for each in asked:
            await keeper.generate(each.request_id, each, total_tokens=300)
        await clients.until(lambda: clients.num_tokens > 16 * 30)
        os.kill(await process_id(engine), signal.SIGKILL)
        await clients.until(lambda: len(clients.finished) == 16)
        assert clients.tokens == expected
        assert keeper.num_replayed == 16
        first, second = keeper.supervisor.attempts
        assert first.death is not None
        assert first.death.cause is Cause.KILLED
        assert second.settings == first.settings
        await keeper.stop()

    async def test_a_killed_actor_is_noticed_within_a_second(
        self, engine: TransformersEngine, clients: Clients
    ) -> None:
        await engine.start(SETTINGS, clients)
        pid = await process_id(engine)
        killed_at_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        await clients.until(lambda: clients.death is not None)
        assert clients.died_at_s - killed_at_s < 1
        with pytest.raises(EngineDied):
            await engine.generate(request(1), ())

    async def test_raised_memory_exhaustion_steps_down_and_loses_nothing(
        self, local_ray: Any, clients: Clients, model_path: str
    ) -> None:
        def make_batch(*args: Any, **limits: Any) -> Any:
            import torch

            from deployments.engines.transformers_batch import Batch

            class Hungry(Batch):
                num_steps = 0

                def step(self) -> object:
                    self.num_steps += 1
                    if self.num_steps > 20 and self.max_num_seqs > 4:
                        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
                    return super().step()

            return Hungry(*args, **limits)

        asked = [request(number, max_tokens=60) for number in range(6)]
        engine = TransformersEngine(model_path, make_batch=make_batch)
        keeper = keeper_of(engine, clients, rungs_of(8, 4))
        await keeper.start()
        for each in asked:
            await keeper.generate(each.request_id, each, total_tokens=200)
        await clients.until(lambda: len(clients.finished) == 6)
        assert clients.tokens == undisturbed(model_path, asked)
        assert [attempt.rung for attempt in keeper.supervisor.attempts] == [
            "8 at once", "4 at once",
        ]  # fmt: skip
        death = keeper.supervisor.attempts[0].death
        assert death is not None
        assert death.cause is Cause.DEVICE_MEMORY
        assert death.phase == "running"
        assert "OutOfMemoryError: CUDA out of memory" in death.message
        assert death.shortage == Shortage(kind=ShortageKind.RUN_TIME, asked_bytes=2 * GIB)
        assert set(death.requests) == {each.request_id for each in asked}
        await keeper.stop()

    async def test_memory_exhaustion_while_loading_steps_down(
        self, local_ray: Any, clients: Clients, model_path: str
    ) -> None:
        def make_batch(model: Any, *, max_num_seqs: int, **limits: Any) -> Any:
            import torch

            from deployments.engines.transformers_batch import Batch

            if max_num_seqs > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return Batch(model, max_num_seqs=max_num_seqs, **limits)

        engine = TransformersEngine(model_path, make_batch=make_batch)
        keeper = keeper_of(engine, clients, rungs_of(8, 4))
        await keeper.start()
        assert keeper.supervisor.rung.name == "4 at once"
        death = keeper.supervisor.attempts[0].death
        assert death is not None
        assert death.shortage == Shortage(kind=ShortageKind.ACTIVATIONS, asked_bytes=2 * GIB)
        await keeper.stop()

    async def test_an_actor_that_exits_by_itself_is_a_death(
        self, local_ray: Any, clients: Clients, model_path: str
    ) -> None:
        def make_batch(*args: Any, **limits: Any) -> Any:
            import os

            from deployments.engines.transformers_batch import Batch

            class Leaving(Batch):
                def step(self) -> object:
                    os._exit(7)

            return Leaving(*args, **limits)

        engine = TransformersEngine(model_path, make_batch=make_batch)
        await engine.start(SETTINGS, clients)
        await engine.generate(request(1), ())
        await clients.until(lambda: clients.death is not None)
        assert clients.death is not None
        assert clients.death.cause is Cause.KILLED
        await engine.stop()

    async def test_an_aborted_request_frees_its_place(
        self, engine: TransformersEngine, clients: Clients
    ) -> None:
        await engine.start(replace(SETTINGS, max_num_seqs=1), clients)
        await engine.generate(request(1, max_tokens=1900), ())
        await engine.generate(request(2, max_tokens=5), ())
        await clients.until(lambda: "request-1" in clients.tokens)
        await engine.abort(["request-1", "nobody"])
        await clients.until(lambda: "request-2" in clients.finished)
        assert "request-1" not in clients.finished
        assert len(clients.tokens["request-1"]) < 1900

    async def test_stop_leaves_no_process_and_start_begins_another_life(
        self, engine: TransformersEngine, clients: Clients
    ) -> None:
        await engine.start(SETTINGS, clients)
        first = psutil.Process(await process_id(engine))
        family = [first, *first.children(recursive=True)]
        await engine.generate(request(1, max_tokens=1900), ())
        await engine.stop()
        assert not any(process.is_running() for process in family)
        assert clients.death is None
        await engine.start(replace(SETTINGS, max_model_len=80), clients)
        await engine.generate(request(2), ())
        await clients.until(lambda: "request-2" in clients.finished)
        assert len(clients.tokens["request-2"]) == 80 - 69

    async def test_a_start_that_is_cancelled_leaves_no_process(
        self, engine: TransformersEngine, clients: Clients
    ) -> None:
        loading = asyncio.create_task(engine.start(SETTINGS, clients))
        await clients.until(lambda: engine._process is not None)
        process = psutil.Process(engine._process.pid)  # type: ignore[union-attr]
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        await engine.stop()
        assert not process.is_running()

    async def test_a_model_that_is_not_there_fails_with_a_sentence(
        self, local_ray: Any, clients: Clients, tmp_path: Path
    ) -> None:
        engine = TransformersEngine("/models/nothing")
        with pytest.raises(LoadFailed, match="no model at /models/nothing") as caught:
            await engine.start(SETTINGS, clients)
        assert caught.value.death.cause is Cause.OTHER
        assert caught.value.death.phase == "loading"
        engine = TransformersEngine(str(tmp_path))
        with pytest.raises(LoadFailed, match="model_type"):
            await engine.start(SETTINGS, clients)

    async def test_it_runs_in_the_bundle_that_it_is_given(
        self, local_ray: Any, clients: Clients, model_path: str
    ) -> None:
        group = local_ray.util.placement_group([{"CPU": 0.5}, {"CPU": 0.5}])
        engine = TransformersEngine(model_path, placement=(group, 1), num_cpus=0.5)
        await engine.start(SETTINGS, clients)
        await engine.generate(request(1), ())
        await clients.until(lambda: "request-1" in clients.finished)
        await engine.stop()
        local_ray.util.remove_placement_group(group)

    async def test_quantization_that_the_checkpoint_lacks_is_refused(
        self, engine: TransformersEngine, clients: Clients
    ) -> None:
        with pytest.raises(LoadFailed, match="awq was asked for, but the checkpoint has none"):
            await engine.start(replace(SETTINGS, quantization="awq"), clients)


@pytest.mark.parametrize(
    ("option", "reason"),
    [("max_num_seqs", "the plan sets it"), ("beams", "known options are attn_implementation")],
)
def test_an_unknown_option_is_refused_with_the_known_ones(option: str, reason: str) -> None:
    with pytest.raises(UnknownOption, match=reason):
        TransformersEngine("any", engine_args={option: "4"})


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineMissing, match=r"pip install 'ballast\[transformers\]'"):
        TransformersEngine("any")


async def test_more_than_one_gpu_is_refused(clients: Clients) -> None:
    with pytest.raises(Invalid, match="one GPU"):
        await TransformersEngine("any").start(replace(SETTINGS, tensor_parallel_size=2), clients)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5},
        {"repetition_penalty": 0.0}, {"presence_penalty": float("inf")}, {"max_tokens": 0},
        {"min_tokens": -1}, {"logprobs": -1},
    ],
    ids=str,
)  # fmt: skip
async def test_a_request_that_would_end_the_engine_is_refused(sampling: Any) -> None:
    engine = TransformersEngine("any")
    bad = TokenRequest(
        request_id="a",
        prompt_token_ids=(1,),
        sampling=Sampling(**{"max_tokens": 1, **sampling}),
    )
    with pytest.raises(Invalid) as caught:
        await engine.generate(bad, ())
    assert caught.value.setting in sampling


@pytest.mark.parametrize("prompt", [(), (-1,), (1, 760)])
def test_a_prompt_that_the_model_can_not_read_is_refused(prompt: tuple[int, ...]) -> None:
    engine = TransformersEngine("any")
    engine.vocabulary_tokens = 760
    with pytest.raises(Invalid) as caught:
        engine.check(replace(request(1), prompt_token_ids=prompt))
    assert caught.value.setting == "prompt"


def test_importing_the_engine_imports_neither_torch_nor_ray() -> None:
    script = (
        "import sys; import deployments.engines.transformers; "
        "print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    )
    root = Path(engine_module.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


class TestFaults:
    """Deaths made to order; what is due and when is in test_faults.py."""

    pytestmark = on_ray

    async def test_it_dies_as_it_was_told_to_and_loses_no_token(
        self, local_ray: Any, model_path: str, clients: Clients
    ) -> None:
        faults = (
            Fault(life=1, phase="load_model"),
            Fault(life=2, after_tokens=40),
            Fault(life=3, at_replay=True, by="exit"),
            Fault(life=4, phase="profiling", by="sigkill"),
        )
        engine = TransformersEngine(model_path, faults=faults)
        keeper = keeper_of(engine, clients, rungs_of(16, 8, 4))
        await keeper.start()
        requests = [request(number, 30) for number in range(4)]
        for each in requests:
            await keeper.generate(each.request_id, each, total_tokens=100)
        await clients.until(lambda: len(clients.finished) == len(requests))
        assert clients.tokens == undisturbed(model_path, requests)
        deaths = [(a.death.phase, a.death.cause) for a in keeper.supervisor.attempts if a.death]
        assert deaths == [
            ("loading", Cause.DEVICE_MEMORY),
            ("running", Cause.DEVICE_MEMORY),
            ("running", Cause.KILLED),  # Ray does not say how a worker ended
            ("loading", Cause.KILLED),
        ]
        await keeper.stop()
