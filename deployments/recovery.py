"""What config and plan make of a recovery: the supervisor, its policy, and what is remembered."""

import os
from dataclasses import asdict

from deployments.config import ModelConfig
from deployments.course import Course
from deployments.diagnosis import diagnose
from deployments.engines.registry import engine_versions
from deployments.policy import fixed
from deployments.restarts import RestartLimit
from deployments.settings_store import SettingsStore, state_folder
from deployments.shapes import shape_of
from deployments.supervisor import Supervisor
from vram.calibration import shape_hash
from vram.case import Case, Model, Tried
from vram.ladder import Rung, fixed_ladder
from vram.plan import Plan
from vram.shortage import Shortage, ShortageKind


def store_of(config: ModelConfig, plan: Plan) -> SettingsStore:
    """By all that has to be the same; who changes the config starts anew."""
    return SettingsStore(
        state_folder(os.environ),
        {
            "model": config.model,
            "shape": shape_hash(shape_of(config)),
            "card": plan.device.name,
            "card_bytes": plan.device.total_bytes,
            "share": plan.gpu_fraction,
            "engine": plan.engine,
            "version": engine_versions().get(plan.engine),
            "engine_args": config.engine_args,
            "policy": config.recovery.policy,
            "rehearsed": bool(config.faults),  # such a death says nothing of the card
            "planned": asdict(plan.settings),
        },
    )


def supervisor_of(
    config: ModelConfig, plan: Plan, store: SettingsStore | None = None
) -> Supervisor:
    """Begins as asked, or as the store remembers where the config allows that."""
    shape, recovery = shape_of(config), config.recovery

    def ladder(longest_request_tokens: int) -> tuple[Rung, ...]:
        return fixed_ladder(
            plan.settings,
            shape,
            plan.device,
            plan.engine,
            longest_request_tokens=longest_request_tokens,
        )

    model = Model(
        name=config.name,
        shape=shape,
        device=plan.device,
        engine=plan.engine,
        planned=plan.settings,
        limit_bytes=int(plan.device.total_bytes * plan.gpu_fraction),
        wishes=config.wishes(),
        allowed=frozenset(recovery.allow),
    )
    limit = RestartLimit(max_restarts=recovery.max_restarts, window_s=recovery.restart_window_s)
    policy = fixed(ladder) if recovery.policy == "fixed" else diagnose(model)
    asked = ladder(0)[0]
    course: Course | None = None
    remembered = store.read() if store is not None and recovery.remember else None
    if remembered is not None:
        unknown = Shortage(kind=ShortageKind.UNKNOWN)
        planned = Tried(asked=plan.settings, settings=plan.settings, shortage=unknown)
        course = remembered.course(asked, Case(model=model, tried=(planned,)).is_permitted)
    supervisor = Supervisor(
        asked, policy, limit, remembered=course, heal_after_s=recovery.heal_after_s
    )
    if remembered is not None and course is not None:
        supervisor.failed_climbs = remembered.failed_climbs
        supervisor.failed_at_s = remembered.failed_at_s
    return supervisor
