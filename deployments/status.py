"""What a replica says of itself: JSON for people, Prometheus for machines."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deployments.course import Move
from deployments.history import Attempt
from deployments.keeper import Keeper
from deployments.learning import Learner
from deployments.measurements import Measured, Measurements
from deployments.supervisor import State
from vram.plan import Plan
from vram.price import price


def report(
    keeper: Keeper[Any],
    plan: Plan,
    measured: Measured | None,
    *,
    engine: str,
    replica: str,
    next_climb_at_s: float | None = None,
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
        "given_up": price(plan.settings, keeper.settings or plan.settings),
        "degraded": _degraded(keeper, next_climb_at_s),
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
        "measured": None if measured is None else asdict(measured.measurement),
        "measured_at": None if measured is None else measured.at_s,
        "events": [_event(attempt) for attempt in keeper.supervisor.attempts],
    }


def _degraded(keeper: Keeper[Any], next_climb_at_s: float | None) -> dict[str, Any] | None:
    """What is less than was asked for, since when, and when more is tried; None for nothing."""
    if not keeper.supervisor.is_degraded:
        return None
    course = keeper.supervisor.course
    started_s = keeper.supervisor.attempts[-1].spawned_at_s
    return {
        "since": started_s if course.since_s is None else course.since_s,
        "rung": course.rung.name,
        "price": price(course.asked.settings, keeper.settings or course.rung.settings),
        "path": [rung.name for rung in course.path],
        "failed_climbs": keeper.supervisor.failed_climbs,
        "next_climb_at": next_climb_at_s,
    }


def _event(attempt: Attempt) -> dict[str, Any]:
    death = attempt.death
    return {
        "attempt": attempt.generation,
        "rung": attempt.rung,
        "price": attempt.price,
        "reason": attempt.reason,
        "move": attempt.move.value,
        "spawned_at": attempt.spawned_at_s,
        "started_at": attempt.started_at_s,
        "died_at": attempt.died_at_s,
        "left_at": attempt.left_at_s,
        "cause": death.cause.value if death else None,
        "phase": death.phase if death else None,
        "message": death.message if death else None,
    }


def _shortage(attempt: Attempt) -> str:
    shortage = attempt.death.shortage if attempt.death else None
    return shortage.kind.value if shortage else "unknown"


_OWN = ("model", "replica")
_Values = Mapping[tuple[str, ...], float]  # by the labels that are not in _OWN


class ReplicaCollector(Collector):
    """Reads the keeper when Prometheus asks, so that nothing is counted twice.

    Every series carries the model and the replica, so that those of several replicas can stand in
    one text.
    """

    def __init__(
        self,
        keeper: Keeper[Any],
        plan: Plan,
        measurements: Measurements,
        learner: Learner,
        *,
        replica: str,
    ) -> None:
        self._keeper = keeper
        self._plan = plan
        self._measurements = measurements
        self._learner = learner
        self._replica = replica

    def collect(self) -> Iterator[Metric]:
        keeper, supervisor = self._keeper, self._keeper.supervisor
        yield self._gauge(
            "ballast_engine_state",
            "1 for the state that the engine is in",
            {(state.value,): float(supervisor.state is state) for state in State},
            "state",
        )
        deaths = (a.death for a in supervisor.attempts if a.death)
        yield self._counter(
            "ballast_engine_deaths",
            "Engine lives that ended",
            Counter((death.cause.value, death.phase) for death in deaths),
            "cause",
            "phase",
        )
        steps = [(a, b) for a, b in pairwise(supervisor.attempts) if b.reason and a.death]
        yield self._counter(
            "ballast_engine_steps",
            "Changes of settings after deaths of memory",
            Counter((step.rung, _shortage(before)) for before, step in steps),
            "step",
            "shortage",
        )
        yield self._gauge(
            "ballast_degraded",
            "1 while it serves with less than was asked for",
            {(): float(supervisor.is_degraded)},
        )
        moves = Counter(attempt.move for attempt in supervisor.attempts)
        yield self._counter(
            "ballast_climbs",
            "Larger settings tried again, and how many of these tries failed",
            {("begun",): moves[Move.CLIMB], ("failed",): moves[Move.BACK]},
            "outcome",
        )
        yield self._gauge("ballast_requests_in_flight", "In the journal", {(): len(keeper.journal)})
        yield self._gauge(
            "ballast_requests_waiting", "Waiting for the engine", {(): keeper.num_waiting}
        )
        yield self._counter(
            "ballast_requests_replayed",
            "Requests that went on in a new engine",
            {(): keeper.num_replayed},
        )
        yield self._gauge(
            "ballast_estimate_bytes",
            "Estimated memory of a GPU",
            {(item.name,): item.bytes for item in self._plan.estimate.items},
            "item",
        )
        newest = self._measurements.newest
        if newest is not None:
            resident_bytes = newest.measurement.resident_bytes
            yield self._gauge(
                "ballast_measured_resident_bytes", "RAM of the engine", {(): resident_bytes}
            )
            device_bytes = newest.measurement.device_bytes
            yield self._gauge(
                "ballast_measured_device_bytes", "GPU memory of the engine", {(): device_bytes}
            )

        yield self._gauge(
            "ballast_measured_over_estimate",
            "What the newest load took, by what it was estimated to take; 1 is exact",
            {(what,): ratio for what, ratio in self._learner.over_estimate.items()},
            "what",
        )
        yield self._counter(
            "ballast_loads_above_estimate",
            "Loads that took over 3 % more than estimated",
            {(): self._learner.num_loads_above},
        )

    def _gauge(self, name: str, documentation: str, values: _Values, *labels: str) -> Metric:
        return self._filled(GaugeMetricFamily(name, documentation, labels=(*_OWN, *labels)), values)

    def _counter(self, name: str, documentation: str, values: _Values, *labels: str) -> Metric:
        family = CounterMetricFamily(name, documentation, labels=(*_OWN, *labels))
        return self._filled(family, values)

    def _filled(self, family: GaugeMetricFamily | CounterMetricFamily, values: _Values) -> Metric:
        for labels, value in values.items():
            family.add_metric([self._keeper.model, self._replica, *labels], value)
        return family
