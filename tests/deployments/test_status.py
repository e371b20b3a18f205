"""What a replica reports: values, and series that those of another replica do not repeat."""

import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from samples import KILLED, OUT_OF_MEMORY
from test_openai_harness import until

from deployments.config import DeviceConfig, ModelConfig
from deployments.engines.fake import FakeEngine
from deployments.engines.protocol import TokenRequest
from deployments.keeper import Keeper
from deployments.learning import Learner
from deployments.measurements import Measurements
from deployments.metrics import merge
from deployments.planning import make_plan
from deployments.policy import fixed
from deployments.restarts import RestartLimit
from deployments.shapes import shape_of
from deployments.status import ReplicaCollector, report
from deployments.supervisor import State, Supervisor
from vram.ladder import Rung
from vram.plan import Plan
from vram.shortage import Shortage, ShortageKind

Ladder = Callable[[int], tuple[Rung, ...]]
FAKE = ModelConfig(
    name="demo", model="-", engine="fake", device=DeviceConfig(kind="cpu", memory_gib=1)
)


@pytest.fixture
def plan() -> Plan:
    return make_plan(FAKE)[0]


@pytest.fixture
async def keeper(ladder: Ladder) -> AsyncIterator[Keeper[TokenRequest]]:
    supervisor = Supervisor(
        ladder(0)[0], fixed(ladder), RestartLimit(max_restarts=2, window_s=600.0)
    )
    keeper = Keeper(
        "demo",
        FakeEngine(),
        supervisor,
        on_step=lambda step: None,
        on_give_up=lambda error: None,
    )
    await keeper.start()
    yield keeper
    await keeper.stop()


async def text_of(keeper: Keeper[TokenRequest], plan: Plan, replica: str) -> str:
    measurements = Measurements(keeper)
    await measurements.refreshed()
    registry = CollectorRegistry()
    learner = Learner(
        "demo", shape_of(FAKE), plan.device, plan.engine, versions={}, path=Path(os.devnull)
    )
    learner.over_estimate = {"device_use": 1.25}
    registry.register(ReplicaCollector(keeper, plan, measurements, learner, replica=replica))
    return generate_latest(registry).decode()


async def test_every_series_carries_its_model_and_its_replica(
    keeper: Keeper[TokenRequest], plan: Plan
) -> None:
    await die(keeper)
    text = await text_of(keeper, plan, "demo#a1")
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    assert {sample.name for sample in samples} == {
        "ballast_climbs_total",
        "ballast_degraded",
        "ballast_engine_deaths_total",
        "ballast_engine_state",
        "ballast_estimate_bytes",
        "ballast_loads_above_estimate_total",
        "ballast_measured_device_bytes",
        "ballast_measured_over_estimate",
        "ballast_measured_resident_bytes",
        "ballast_requests_in_flight",
        "ballast_requests_replayed_total",
        "ballast_requests_waiting",
    }
    for sample in samples:
        assert sample.labels["model"] == "demo"
        assert sample.labels["replica"] == "demo#a1"
    states = [s for s in samples if s.name == "ballast_engine_state"]
    assert {s.labels["state"]: s.value for s in states} == {
        state.value: float(state is State.READY) for state in State
    }
    (deaths,) = [s for s in samples if s.name == "ballast_engine_deaths_total"]
    assert (deaths.labels["cause"], deaths.labels["phase"], deaths.value) == (
        "killed", "running", 1.0,
    )  # fmt: skip


async def test_prometheus_takes_the_joined_text_of_several_replicas(
    keeper: Keeper[TokenRequest], plan: Plan
) -> None:
    """It refuses a text in which a series stands twice, or a family is declared twice."""
    merged = merge([await text_of(keeper, plan, replica) for replica in ("a", "b", "c")])
    families = list(text_string_to_metric_families(merged))
    series = [(s.name, *sorted(s.labels.items())) for f in families for s in f.samples]
    assert series
    assert max(Counter(series).values()) == 1
    declared = re.findall(r"^# TYPE (\S+)", merged, re.MULTILINE)
    assert len(declared) == len(set(declared))


async def test_a_report_has_the_measurement_and_its_time(
    keeper: Keeper[TokenRequest], plan: Plan
) -> None:
    measured = await Measurements(keeper, clock=lambda: 1234.5).refreshed()
    said = report(keeper, plan, measured, engine="fake", replica="demo#a1")
    assert said["measured"] == {
        "resident_bytes": 0,
        "device_bytes": 0,
        "process_ids": (),
        "reported": {},
    }
    assert said["measured_at"] == 1234.5
    assert said["replica"] == "demo#a1"
    unmeasured = report(keeper, plan, None, engine="fake", replica="demo#a1")
    assert unmeasured["measured"] is None
    assert unmeasured["measured_at"] is None


async def test_a_report_has_every_death(keeper: Keeper[TokenRequest], plan: Plan) -> None:
    await die(keeper)
    first, second = report(keeper, plan, None, engine="fake", replica="a")["events"]
    assert (first["cause"], first["phase"]) == ("killed", "running")
    assert second["cause"] is None


async def die(keeper: Keeper[TokenRequest]) -> None:
    """And come back."""
    assert isinstance(keeper.engine, FakeEngine)
    keeper.engine.die(KILLED)
    await until(lambda: keeper.is_serving and keeper.supervisor.generation == 2)


async def test_a_step_down_is_named_with_its_price_and_counted(
    keeper: Keeper[TokenRequest], plan: Plan
) -> None:
    assert isinstance(keeper.engine, FakeEngine)
    shortage = Shortage(kind=ShortageKind.RUN_TIME)
    keeper.engine.die(replace(OUT_OF_MEMORY, shortage=shortage))
    await until(lambda: keeper.is_serving and keeper.supervisor.generation == 2)
    event = report(keeper, plan, None, engine="fake", replica="a")["events"][1]
    assert (event["rung"], event["price"]) == ("half", "context 1024")
    assert event["reason"]
    samples = text_string_to_metric_families(await text_of(keeper, plan, "a"))
    (step,) = [s for family in samples for s in family.samples if "_steps_" in s.name]
    assert (step.labels["step"], step.labels["shortage"]) == ("half", "run_time")


async def test_a_degraded_replica_says_what_is_less_since_when_and_when_more_is_tried(
    keeper: Keeper[TokenRequest], plan: Plan
) -> None:
    def degraded() -> object:
        said = report(keeper, plan, None, engine="fake", replica="a", next_climb_at_s=99.0)
        return said["degraded"]

    assert degraded() is None
    assert isinstance(keeper.engine, FakeEngine)
    keeper.engine.die(OUT_OF_MEMORY)
    await until(lambda: keeper.is_serving and keeper.supervisor.generation == 2)
    assert degraded() == {
        "since": keeper.supervisor.attempts[0].died_at_s,
        "rung": "half",
        "price": "context 2048 → 1024 tokens",
        "path": ["user"],
        "failed_climbs": 0,
        "next_climb_at": 99.0,
    }
    assert 'ballast_degraded{model="demo",replica="a"} 1.0' in await text_of(keeper, plan, "a")
    assert keeper.climb("it has been quiet")
    await until(lambda: keeper.is_serving and keeper.supervisor.generation == 3)
    assert degraded() is None
    text = await text_of(keeper, plan, "a")
    assert 'ballast_degraded{model="demo",replica="a"} 0.0' in text
    assert 'ballast_climbs_total{model="demo",outcome="begun",replica="a"} 1.0' in text
    assert 'step="user"' not in text  # a climb is no step after a death
