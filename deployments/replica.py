"""The Ray Serve replica: HTTP ends here, and the engine lives beside it. Thin on purpose."""

import os
from typing import Any

import ray
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from deployments.config import ModelConfig
from deployments.engines.registry import engine_versions
from deployments.errors import Fatal, Invalid
from deployments.guards.admission import Admission
from deployments.guards.api_keys import ApiKeys, load_api_keys
from deployments.guards.body_limit import BodyLimit
from deployments.guards.json_guard import JsonGuard
from deployments.guards.response_time import ResponseTime
from deployments.guards.turnstile import Turnstile
from deployments.inference_stream import InferenceStream
from deployments.learning import Learner
from deployments.measurements import Measurements
from deployments.pages import Pages
from deployments.relay.port import Address, ReplicaPort
from deployments.serving import Serving, start_serving
from deployments.shapes import shape_of
from deployments.status import ReplicaCollector, report
from deployments.supervisor import State
from placement.bundles import Bundles
from vram.calibration import calibration_path
from vram.plan import Plan


class Replica:
    """One replica of one model."""

    # Ray Serve awaits it.
    async def __init__(  # type: ignore[misc]
        self, config: ModelConfig, plan: Plan, bundles: Bundles
    ) -> None:
        self._config = config
        self._plan = plan
        self._keys = load_api_keys(config.api_keys_file)  # before minutes of loading
        group = ray.util.get_current_placement_group()
        _check_placement(config.name, bundles, group)
        self._serving: Serving = await start_serving(config, plan, placement_group=group)
        self._learner = Learner(
            config.name,
            shape_of(config),
            plan.device,
            plan.engine,
            versions=engine_versions(),
            path=calibration_path(os.environ),
        )
        self._measurements = Measurements(self._serving.keeper, on_measured=self._learner.heard)
        self._replica = serve.get_replica_context().replica_tag
        collector = ReplicaCollector(
            self._serving.keeper,
            plan,
            self._measurements,
            self._learner,
            replica=self._replica,
        )
        self._registry = CollectorRegistry()
        self._registry.register(collector)
        REGISTRY.register(collector)  # vLLM's /metrics shows the default registry
        self._relay_address: Address | None = None
        if config.recovery.survive_replica:
            self._relay_address = await self._open_to_relays()

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        config, keeper = self._config, self._serving.keeper

        async def admission() -> None:
            recovery = config.recovery
            await keeper.admission(wait_s=recovery.wait_s, max_waiting=recovery.max_waiting)

        inner = self._serving.app
        if config.engine == "vllm":  # our own OpenAI layer waits for the engine by itself
            if self._plan.device.kind == "cpu":  # see there for why not beside a GPU
                inner = Turnstile(inner)
            inner = Admission(inner, admission)
        api = InferenceStream(inner, model=config.name)
        pages = {"/health": self._health_page, "/status": self._status_page}
        if config.engine != "vllm":  # which has metrics of its own, ours among them
            pages["/metrics"] = self._metrics_page
        own = Pages(JsonGuard(api), pages)
        guarded = ApiKeys(own, self._keys)
        return ResponseTime(BodyLimit(guarded, max_body_bytes=config.limits.max_body_bytes))

    def relay_address(self) -> Address | None:
        """For the relay, which asks every replica; its secret comes by no other way."""
        return None if self._serving.keeper.state is State.FAILED else self._relay_address

    async def check_health(self) -> None:
        """Healthy while it recovers: Ray Serve must not replace a replica that holds streams."""
        if self._serving.keeper.state is State.FAILED:
            raise Fatal(f"{self._config.name}: {self._serving.keeper.supervisor.reason}")
        self._measurements.watch()  # so that every load is learned from

    async def status(self) -> dict[str, Any]:
        """For the gateway, which asks every replica."""
        return report(
            self._serving.keeper,
            self._plan,
            await self._measurements.refreshed(),
            engine=self._config.engine,
            replica=self._replica,
            next_climb_at_s=self._serving.healer.next_climb_at_s,
        )

    async def metrics(self) -> str:
        """Ballast's own metrics of this replica, in Prometheus's text format."""
        await self._measurements.refreshed()
        return generate_latest(self._registry).decode()

    async def __del__(self) -> None:
        if hasattr(self, "_serving"):
            await self._serving.stop()

    async def _open_to_relays(self) -> Address:
        keeper = self._serving.keeper
        port = ReplicaPort(
            await self.__serve_build_asgi_app__(),
            replica=self._replica,
            has_given_up=lambda: keeper.state is State.FAILED,
        )
        return await port.open(ray.util.get_node_ip_address())

    async def _health_page(self, request: Request) -> Response:
        state = self._serving.keeper.state
        return JSONResponse(
            {"status": state.value}, status_code=503 if state is State.FAILED else 200
        )

    async def _status_page(self, request: Request) -> Response:
        return JSONResponse(await self.status())

    async def _metrics_page(self, request: Request) -> Response:
        return PlainTextResponse(await self.metrics())


def _check_placement(name: str, planned: Bundles, group: Any) -> None:
    """`placement_group_bundles` written by hand in the YAML would silently replace the plan's."""
    actual = tuple(group.bundle_specs) if group is not None else ()
    if actual != planned.bundles:
        raise Invalid(
            f"{name}: the placement group has {list(actual)}, the plan says "
            f"{list(planned.bundles)}; remove placement_group_bundles from the YAML: "
            f"the plan is its only owner",
            "placement_group_bundles",
        )
