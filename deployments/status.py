"""What a replica says of itself: JSON for people, Prometheus for machines."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deployments.engines.protocol import Measurement
from deployments.keeper import Keeper
from deployments.supervisor import Attempt, State
from vram.plan import Plan


def report(
    keeper: Keeper[Any], plan: Plan, measured: Measurement | None, *, engine: str, replica: str
) -> dict[str, Any]:
    """The plan, the estimate next to what was measured, and the whole history of the engine."""
    estimate = plan.estimate
    return {
        "model": keeper.model,
        "replica": replica,
        "engine": engine,
        "state": keeper.state.value,
        "reason": keeper.supervisor.reason,
        "attempt": keeper.supervisor.generation,
        "rung": keeper.supervisor.rung.name,
        "requests": {
            "in_flight": len(keeper.journal),
            "waiting": keeper.num_waiting,
            "replayed": keeper.num_replayed,
        },
        "plan": {
            "device": {"name": plan.device.name, "total_bytes": plan.device.total_bytes},
            "gpu_fraction": plan.gpu_fraction,
            "settings": asdict(plan.settings),
            "notes": list(plan.notes),
        },
        "settings": None if keeper.settings is None else asdict(keeper.settings),
        "estimate": {
            "items": {item.name: item.bytes for item in estimate.items},
            "total_bytes": estimate.total_bytes,
            "device_use_under_load_bytes": estimate.device_use_under_load_bytes,
            "kv_cache_tokens": estimate.kv_cache_tokens,
        },
        "measured": None if measured is None else asdict(measured),
        "events": [_event(attempt) for attempt in keeper.supervisor.attempts],
    }


def _event(attempt: Attempt) -> dict[str, Any]:
    death = attempt.death
    return {
        "attempt": attempt.generation,
        "rung": attempt.rung,
        "price": attempt.price,
        "spawned_at": attempt.spawned_at_s,
        "started_at": attempt.started_at_s,
        "died_at": attempt.died_at_s,
        "cause": death.cause.value if death else None,
        "phase": death.phase if death else None,
        "message": death.message if death else None,
    }


class ReplicaCollector(Collector):
    """Reads the keeper when Prometheus asks, so that nothing is counted twice."""

    def __init__(self, keeper: Keeper[Any], plan: Plan) -> None:
        self._keeper = keeper
        self._plan = plan
        self.measured: Measurement | None = None  # the newest one

    def collect(self) -> Iterator[Metric]:
        model = self._keeper.model
        supervisor = self._keeper.supervisor
        state = GaugeMetricFamily(
            "ballast_engine_state",
            "1 for the state that the engine is in",
            labels=["model", "state"],
        )
        for name in State:
            state.add_metric([model, name.value], float(supervisor.state is name))
        yield state
        deaths = CounterMetricFamily(
            "ballast_engine_deaths", "Engine lives that ended", labels=["model", "cause", "phase"]
        )
        causes = Counter(
            (a.death.cause.value, a.death.phase) for a in supervisor.attempts if a.death
        )
        for (cause, phase), number in causes.items():
            deaths.add_metric([model, cause, phase], number)
        yield deaths
        yield self._gauge("ballast_requests_in_flight", "In the journal", len(self._keeper.journal))
        yield self._gauge(
            "ballast_requests_waiting", "Waiting for the engine", self._keeper.num_waiting
        )
        replayed = CounterMetricFamily(
            "ballast_requests_replayed", "Requests that went on in a new engine", labels=["model"]
        )
        replayed.add_metric([model], self._keeper.num_replayed)
        yield replayed
        estimate = GaugeMetricFamily(
            "ballast_estimate_bytes", "Estimated memory of a GPU", labels=["model", "item"]
        )
        for item in self._plan.estimate.items:
            estimate.add_metric([model, item.name], item.bytes)
        yield estimate
        if self.measured is not None:
            yield self._gauge(
                "ballast_measured_resident_bytes", "RAM of the engine", self.measured.resident_bytes
            )
            yield self._gauge(
                "ballast_measured_device_bytes",
                "GPU memory of the engine",
                self.measured.device_bytes,
            )

    def _gauge(self, name: str, documentation: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, documentation, labels=["model"])
        gauge.add_metric([self._keeper.model], value)
        return gauge
