"""The check around loads: one line before each, settings that fit what is free, and room later."""

import asyncio
from typing import Any

import structlog
from ray.exceptions import RayError

from deployments import orphans
from deployments.cards import Card, available, free_here
from deployments.config import ModelConfig
from deployments.engines.protocol import LoadFailed, Measurement
from deployments.healing import Room
from deployments.learning import device_use_bytes
from deployments.oom import Cause, Death
from deployments.shapes import shape_of
from vram.errors import DoesNotFit, Invalid
from vram.estimate import estimate
from vram.plan import Plan
from vram.precheck import precheck
from vram.settings import EngineSettings
from vram.shortage import Shortage, ShortageKind

log = structlog.get_logger(__name__)


class LoadCheck:
    """Of one replica."""

    def __init__(self, config: ModelConfig, plan: Plan, placement_group: Any) -> None:
        self._config = config
        self._plan = plan
        self._placement_group = placement_group
        self._shape = shape_of(config)
        self._free_bytes: int | None = None  # before the last load
        self._most_free_bytes = 0
        self._cards: tuple[Card, ...] = ()

    async def __call__(self, settings: EngineSettings) -> EngineSettings:
        """What to load with. Raises `LoadFailed` where nothing that is free will do."""
        config, plan = self._config, self._plan
        if config.skip_vram_check:
            return settings
        await orphans.reap()  # of a replica that has died since, on this node
        try:
            found = await available(
                plan,
                self._placement_group,
                expected_bytes=self._most_free_bytes,
                back_s=config.recovery.memory_back_s,
            )
        except RayError as error:  # of a task that looks at a card: the load itself will tell
            log.warning("vram_check_failed", model=config.name, error=str(error))
            return settings
        free_bytes = self._free_bytes = found.free_bytes
        self._cards = found.cards
        self._most_free_bytes = max(self._most_free_bytes, free_bytes)
        try:
            result = precheck(
                self._shape, settings, plan.device, free_bytes, plan.engine, name=config.name
            )
        except DoesNotFit as refusal:
            context = [i.bytes for i in plan.estimate.outside if i.name == "context"]
            shortage = Shortage(
                kind=ShortageKind.NOT_FREE,
                asked_bytes=refusal.needed_bytes,
                free_bytes=max(free_bytes - sum(context), 0),  # as its engine would see it
                total_bytes=plan.device.total_bytes,
            )
            death = Death(
                cause=Cause.DEVICE_MEMORY,
                phase="loading",
                message=f"{refusal} ({found.held_by})",
                shortage=shortage,
            )
            raise LoadFailed(death) from refusal
        log.info("vram_check", model=config.name, check=result.line)
        return result.settings

    async def room(
        self, larger: EngineSettings, now: EngineSettings, held: Measurement
    ) -> Room | None:
        """For `larger`, if the engine that runs with `now` makes way; None where nobody knows."""
        plan = self._plan
        held_bytes = device_use_bytes(held, plan.device, now)
        if self._free_bytes is None or (not held_bytes and plan.device.kind == "cuda"):
            return None
        try:
            needed = estimate(self._shape, larger, plan.device, plan.engine)
        except Invalid:
            return None
        free_bytes = await self._free_now()
        if free_bytes is None:
            return None
        share_bytes = int(plan.device.total_bytes * plan.gpu_fraction)
        return Room(
            needed_bytes=needed.device_use_under_load_bytes,
            then_bytes=self._free_bytes,
            now_bytes=min(share_bytes, free_bytes + held_bytes),
        )

    async def _free_now(self) -> int | None:
        if self._plan.device.kind == "cpu":
            found = await available(self._plan, self._placement_group, back_s=0.0)
            return found.free_bytes
        import ray

        node_id = ray.get_runtime_context().get_node_id()
        return await asyncio.to_thread(free_here, self._cards, node_id)
