"""Deaths made to order in real vLLM: one engine, nine lives, and the same text in the end."""

import asyncio
import gc
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from samples import SETTINGS

from cluster.demo_model import build_demo_model
from deployments import processes
from deployments.engines.vllm_faults import FAULTS, Steps, environment
from deployments.faults import Fault, Rehearsal
from deployments.history import Attempt
from deployments.keeper import Keeper
from deployments.oom import Cause
from deployments.phases import Phase
from deployments.restarts import RestartLimit
from deployments.supervisor import State, Supervisor
from vram.ladder import Rung
from vram.shortage import ShortageKind
from vram.units import MIB

PROMPTS = [f"This is number {number}. Once" for number in range(6)]
TOKENS = 40
STORY = (
    *(
        Fault(life=life, phase=phase)
        for life, phase in enumerate(
            (
                Phase.LOAD_MODEL, Phase.PROFILING, Phase.KV_PLANNING, Phase.KV_ALLOCATION,
                Phase.WARM_UP,
            ),
            1,
        )
    ),
    Fault(life=6, prompt_contains="number 4.", after_tokens=30),
    Fault(life=7, at_replay=True, by="exit"),
    Fault(life=8, after_tokens=50, cause=Cause.KILLED),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Story:
    attempts: tuple[Attempt, ...]
    disturbed: list[list[int]]
    undisturbed: list[list[int]]
    num_replayed: int
    left_behind: list[Any]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    model = tmp_path_factory.mktemp("demo")
    build_demo_model(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vLLM's own, and of its objects that nobody closes
            told = asyncio.run(_live_through(str(model)))
            gc.collect()
        return told


async def _live_through(model: str) -> Story:
    from vllm import SamplingParams

    from deployments.engines import vllm_front
    from deployments.engines.vllm import VLLMEngine

    args = vllm_front.front_args(model, "demo", {})
    engine = VLLMEngine(lambda s: vllm_front.make_config(args, s), faults=STORY)
    rung = Rung(
        name="user",
        settings=replace(SETTINGS, max_model_len=512, max_num_seqs=8),
        price="",
        skipped_reason=None,
    )
    core = vllm_front.JournaledCore()
    limit = RestartLimit(max_restarts=9, window_s=9e9)
    keeper: Keeper[Any] = Keeper(
        "demo",
        engine,
        Supervisor(rung, lambda *_, **__: rung, limit),
        on_step=core.on_step,
        on_give_up=core.on_give_up,
    )
    core.attach(keeper, engine)
    await keeper.start()
    assert engine.config is not None
    llm = vllm_front.make_llm(core, engine.config)

    async def answer(prompt: str, name: str) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        token_ids: list[int] = []
        async for output in llm.generate(prompt, params, request_id=name):
            token_ids = list(output.outputs[0].token_ids)
        return token_ids

    async def answers(run: str) -> list[list[int]]:
        return await asyncio.gather(*(answer(p, f"{run}{i}") for i, p in enumerate(PROMPTS)))

    try:
        disturbed = await answers("disturbed")
        undisturbed = await answers("undisturbed")
        assert keeper.state is State.READY
    finally:
        life = engine._life
        await keeper.stop()
        llm.shutdown()
    return Story(
        attempts=keeper.supervisor.attempts,
        disturbed=disturbed,
        undisturbed=undisturbed,
        num_replayed=keeper.num_replayed,
        left_behind=processes.find(life),
    )


@pytest.mark.vllm
@pytest.mark.timeout(600)
class TestStory:
    def test_no_token_is_lost_or_repeated_or_another_one(self, story: Story) -> None:
        assert [len(tokens) for tokens in story.undisturbed] == [TOKENS] * len(PROMPTS)
        assert story.disturbed == story.undisturbed
        assert story.num_replayed == 3 * len(PROMPTS)

    def test_a_life_dies_where_it_was_told_to(self, story: Story) -> None:
        deaths = [(a.death.phase, a.death.cause) for a in story.attempts if a.death is not None]
        assert deaths == [
            *[("loading", Cause.DEVICE_MEMORY)] * 5,
            ("running", Cause.DEVICE_MEMORY),
            # A worker that exits is `other`, or gone without a word: vLLM sometimes looks for its
            # exit code before the kernel has it.
            ("running", Cause.KILLED if deaths[6][1] is Cause.KILLED else Cause.OTHER),
            ("running", Cause.KILLED),
        ]
        assert len(story.attempts) == 9

    def test_memory_is_short_where_it_was_told_to_be(self, story: Story) -> None:
        shortages = [a.death.shortage for a in story.attempts[:6] if a.death is not None]
        assert [shortage and shortage.kind for shortage in shortages] == [
            ShortageKind.WEIGHTS,
            ShortageKind.ACTIVATIONS,
            ShortageKind.NO_CACHE_BLOCKS,
            ShortageKind.CACHE_ALLOCATION,
            ShortageKind.WARM_UP,
            ShortageKind.RUN_TIME,
        ]
        missing = [shortage and shortage.missing_bytes for shortage in shortages]
        assert missing == [16 * MIB, 16 * MIB, None, 16 * MIB, 16 * MIB, 16 * MIB]

    def test_the_poisonous_request_was_in_the_batch_that_died(self, story: Story) -> None:
        death = story.attempts[5].death
        assert death is not None
        assert any(name.startswith("disturbed4") for name in death.requests)

    def test_nothing_of_it_is_left(self, story: Story) -> None:
        assert story.left_behind == []
        assert FAULTS not in os.environ


def scheduled(
    *,
    new: tuple[tuple[str, int], ...] = (),
    cached: tuple[tuple[str, int], ...] = (),
    tokens: dict[str, int],
    finished: tuple[str, ...] = (),
    extra: dict[str, int] | None = None,
) -> Any:
    """vLLM's SchedulerOutput, as far as it is read: (id, length of the prompt), (id, computed)."""
    return SimpleNamespace(
        finished_req_ids=set(finished),
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id=name,
                prompt_token_ids=[1] * length,
                prefill_token_ids=None,
                num_computed_tokens=0,
                sampling_params=SimpleNamespace(extra_args=extra),
            )
            for name, length in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _ in cached],
            num_computed_tokens=[computed for _, computed in cached],
        ),
        num_scheduled_tokens=tokens,
    )


def steps(**fault: Any) -> Steps:
    told = Fault(cause=Cause.OTHER, message="now", **fault)
    return Steps(Rehearsal([told], 1), lambda token_ids: f"{len(token_ids)} tokens")


def test_a_part_of_a_long_prompt_is_no_token() -> None:
    worker = steps(after_tokens=2)
    worker.begin(scheduled(new=(("a", 20),), tokens={"a": 15}))  # the rest follows
    worker.begin(scheduled(cached=(("a", 15),), tokens={"a": 5}))  # the first token
    worker.begin(scheduled(cached=(("a", 20),), tokens={"a": 1}))  # the second
    with pytest.raises(RuntimeError, match="now"):
        worker.begin(scheduled(cached=(("a", 21),), tokens={"a": 1}))


def test_a_step_without_requests_is_none() -> None:
    steps().begin(scheduled(tokens={}))


def test_a_prompt_counts_as_long_as_its_request_is_in_the_batch() -> None:
    worker = steps(prompt_contains="7 tokens", after_tokens=1)
    worker.begin(scheduled(new=(("a", 7), ("b", 3)), tokens={"a": 7, "b": 3}))
    worker.begin(scheduled(cached=(("b", 3),), tokens={"b": 1}, finished=("a",)))
    with pytest.raises(RuntimeError, match="now"):
        worker.begin(scheduled(new=(("c", 7),), cached=(("b", 4),), tokens={"b": 1, "c": 7}))


def test_a_replay_is_known_by_what_its_client_has() -> None:
    from deployments.engines.vllm_plugin import EMITTED

    worker = steps(at_replay=True)
    worker.begin(scheduled(new=(("a", 7),), tokens={"a": 7}))
    with pytest.raises(RuntimeError, match="now"):
        worker.begin(scheduled(new=(("b", 7),), tokens={"b": 7}, extra={EMITTED: 2}))


def test_only_a_life_with_faults_is_told_of_them() -> None:
    faults = [Fault(life=2, phase=Phase.LOAD_MODEL), Fault(life=4, by="exit")]
    assert [bool(environment(faults, life)) for life in range(1, 6)] == [
        False, True, False, True, False,
    ]  # fmt: skip
    assert environment([Fault()], 7)


@pytest.fixture
def bare() -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("BALLAST")}
    return {**ours, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def test_the_plugin_does_nothing_in_a_process_that_is_not_ours(bare: dict[str, str]) -> None:
    """vLLM loads plugins in helpers, too, that inherit none of our variables."""
    code = (
        "import sys, deployments.engines.vllm_plugin as plugin\n"
        "plugin.register()\n"
        "from deployments.engines import vllm_faults; vllm_faults.install()\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('vllm', 'torch')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=bare, timeout=60)
