"""The rows of `benchmarks.faults`: what is done to the engine in each, and which share a server.

A row names its lives relative to the one that serves when it begins, 0. Lives are counted from a
server's start, so a group of rows is written into one config, with each row's lives after those of
the rows before it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.config import RecoveryConfig

# As vLLM names its processes; the replica is EngineCore's parent.
ENGINE_CORE, WORKER, REPLICA = "VLLM::EngineCore", "VLLM::Worker", "replica"
STOPPED_S = 10.0  # recovery.stopped_s of the rows with a stopped engine
PHASES = ("load_model", "profiling", "kv_planning", "kv_allocation", "warm_up")


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """A signal from outside, when a quarter of the tokens are there."""

    process: str
    signal_name: str = "SIGKILL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    name: str
    title: str
    blow: Blow | None = None
    # By life; `MARKED` stands for the mark of a request a quarter into the load.
    faults: tuple[tuple[int, dict[str, Any]], ...] = ()
    lives: int = 0  # that end in it
    at_start: bool = False  # its first fault meets the first load of the server
    half_come_late: bool = False  # as many clients again, who begin when it happens
    recovery: dict[str, Any] = field(default_factory=dict)  # config that it needs

    @property
    def dies_before_load(self) -> bool:
        """The server's first load fails, and the load of requests meets the next."""
        return self.at_start and self.faults[0][1]["phase"] != "execute_model"

    @property
    def missing_settings(self) -> list[str]:
        """Of `recovery`, that this version does not have."""
        return sorted(set(self.recovery) - set(RecoveryConfig.model_fields))


MARKED = "{marked}"
_IN_A_STEP = {"phase": "execute_model", "prompt_contains": MARKED}


def _at_start(phase: str) -> Row:
    return Row(
        name=f"start-{phase}",
        title=f"memory error in {phase}, first load",
        faults=((0, {"phase": phase}),),
        lives=1,
        at_start=True,
    )


def _at_restart(phase: str) -> Row:
    return Row(
        name=f"restart-{phase}",
        title=f"EngineCore killed, memory error in {phase}",
        blow=Blow(process=ENGINE_CORE),
        faults=((1, {"phase": phase}),),
        lives=2,
    )


# Each group is one server. At most three deaths of memory in each: the ladder `fixed` has no more.
GROUPS: tuple[tuple[Row, ...], ...] = (
    (
        Row(name="undisturbed", title="undisturbed"),
        Row(name="core", title="EngineCore killed", blow=Blow(process=ENGINE_CORE), lives=1),
        Row(name="worker", title="worker killed", blow=Blow(process=WORKER), lives=1),
        Row(
            name="waiting",
            title="killed while half stream and half wait",
            blow=Blow(process=ENGINE_CORE),
            lives=1,
            half_come_late=True,
        ),
        Row(
            name="replay",
            title="killed, memory error in the first step of the replay",
            blow=Blow(process=ENGINE_CORE),
            faults=((1, {"at_replay": True}),),
            lives=2,
        ),
    ),
    # The marked request is in every row's load: a fault that waits for it in a row's first life
    # would meet it in the row before, if there were one on the same server.
    (
        Row(
            name="three",
            title="memory error in a step, in kv_allocation, killed in warm_up",
            faults=(
                (0, _IN_A_STEP),
                (1, {"phase": "kv_allocation"}),
                (2, {"phase": "warm_up", "by": "sigkill"}),
            ),
            lives=3,
        ),
    ),
    (
        Row(
            name="start-execute_model",
            title="memory error in execute_model, first step of all",
            faults=((0, {"phase": "execute_model"}),),
            lives=1,
            at_start=True,
        ),
    ),
    (
        Row(
            name="execute_model",
            title="memory error in execute_model",
            faults=((0, _IN_A_STEP),),
            lives=1,
        ),
    ),
    *((_at_start(phase), _at_restart(phase)) for phase in PHASES),
    (
        Row(
            name="stopped-core",
            title="EngineCore stopped (SIGSTOP)",
            blow=Blow(process=ENGINE_CORE, signal_name="SIGSTOP"),
            lives=1,
            recovery={"stopped_s": STOPPED_S},
        ),
        Row(
            name="stopped-worker",
            title="worker stopped (SIGSTOP)",
            blow=Blow(process=WORKER, signal_name="SIGSTOP"),
            lives=1,
            recovery={"stopped_s": STOPPED_S},
        ),
    ),
    (
        Row(
            name="replica",
            title="replica killed, second tier",
            blow=Blow(process=REPLICA),
            recovery={"survive_replica": True},
        ),
    ),
)
ROWS = {row.name: row for group in GROUPS for row in group}

# Rows of the neighbour, each on a server of its own.
RAY_SERVERS = {"ray-core": "ray-default", "ray-direct-core": "ray-direct"}


def groups(names: Iterable[str]) -> Iterator[tuple[Row, ...]]:
    """The rows with these names, by server."""
    wanted = set(names)
    for group in GROUPS:
        chosen = tuple(row for row in group if row.name in wanted)
        if chosen:
            yield chosen


def faults_of(rows: Sequence[Row], marked: str) -> list[dict[str, Any]]:
    """As a config has them: the lives of these rows one after the other, the first is 1."""
    faults = []
    for row, base in zip(rows, first_lives(rows), strict=True):
        for life, fault in row.faults:
            words = {key: marked if value == MARKED else value for key, value in fault.items()}
            faults.append({"life": base + life, **words})
    return faults


def first_lives(rows: Sequence[Row]) -> list[int]:
    """The life that each row begins with."""
    lives, life = [], 1
    for row in rows:
        lives.append(life)
        life += row.lives
    return lives
