"""Deaths of a real vLLM, as its processes tell of them: the plugin, the box, the reading of it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samples import SETTINGS

from cluster.demo_model import build_demo_model
from deployments.engines.protocol import LoadFailed, Step
from deployments.oom import Cause, Death
from vram.settings import EngineSettings
from vram.shortage import Shortage, ShortageKind
from vram.units import MIB, gib_to_bytes

pytest.importorskip("vllm")

from deployments.engines import vllm_front
from deployments.engines.vllm import VLLMEngine

# vLLM and torch call what they themselves have deprecated.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
SMALL = replace(SETTINGS, max_num_seqs=4, kv_cache_memory_bytes=64 * MIB, enforce_eager=True)


class Heard:
    """A listener that keeps the death."""

    def __init__(self) -> None:
        self.death: asyncio.Future[Death] = asyncio.get_running_loop().create_future()

    def stepped(self, step: Step) -> None:
        pass

    def died(self, death: Death) -> None:
        self.death.set_result(death)


@pytest.fixture
async def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[VLLMEngine]:
    """With vLLM's caches cold: then it also starts helpers of its own, with our plugin in them."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    model = tmp_path / "model"
    build_demo_model(model)
    args = vllm_front.front_args(str(model), "demo", {})

    def make_config(settings: EngineSettings) -> Any:
        config = vllm_front.make_config(args, settings)
        config.parallel_config.worker_cls = "failing_worker.FailingWorker"
        return config

    engine = VLLMEngine(make_config)
    yield engine
    await engine.stop()


async def test_an_engine_says_why_it_does_not_start_and_what_was_in_the_step_that_ended_it(
    engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import envs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    # Planning of the cache: one longest sequence does not fit.
    with pytest.raises(LoadFailed) as caught:
        await engine.start(replace(SMALL, kv_cache_memory_bytes=MIB // 2), Heard())
    shortage = caught.value.death.shortage
    assert shortage is not None, caught.value.death
    assert shortage.kind is ShortageKind.CONTEXT_TOO_LONG
    assert shortage.max_model_len is not None
    assert 0 < shortage.max_model_len < SMALL.max_model_len
    assert not engine._black_box.exists()
    await engine.stop()

    # A step with one request in it.
    heard = Heard()
    await engine.start(SMALL, heard)
    request = EngineCoreRequest(
        request_id="request-1",
        prompt_token_ids=[3, 4, 5],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=4),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    await engine.generate(request, ())
    death = await asyncio.wait_for(heard.death, timeout=60)
    assert death == Death(
        cause=Cause.DEVICE_MEMORY,
        phase="running",
        message=death.message,
        shortage=Shortage(
            kind=ShortageKind.RUN_TIME,
            asked_bytes=gib_to_bytes(1.5),
            free_bytes=512 * MIB,
            total_bytes=gib_to_bytes(79.25),
        ),
        requests=("request-1",),
    )
    assert death.message.startswith("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate")

    # What vLLM has read in the environment it remembers for a life, and no longer.
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "of the next life")
    assert envs.VLLM_RPC_BASE_PATH != "of the next life"
    await engine.stop()
    assert envs.VLLM_RPC_BASE_PATH == "of the next life"
