"""The Ray Serve deployment in front of a model whose streams survive its replicas. Thin."""

import asyncio
import json
from contextlib import suppress
from typing import Any

import structlog
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.config import ModelConfig
from deployments.guards.api_keys import ApiKeys, load_api_keys
from deployments.guards.body_limit import BodyLimit
from deployments.guards.paths import route_path
from deployments.guards.response_time import ResponseTime
from deployments.openai.wire import send_json
from deployments.relay.directory import Directory
from deployments.relay.forward import Forward
from deployments.relay.port import Address
from deployments.supervisor import State

RELAY_DEPLOYMENT = "Relay"
_ASK_S = 0.5  # between questions for the replicas that are there
_ANSWER_S = 5.0

log = structlog.get_logger(__name__)


class Relay:
    """Ends HTTP for one model, and keeps a copy of its replicas' journals."""

    # Ray Serve awaits it.
    async def __init__(self, config: ModelConfig, replicas: DeploymentHandle) -> None:  # type: ignore[misc]
        self._config = config
        self._keys = load_api_keys(config.api_keys_file)
        self._replicas = replicas
        self._directory = Directory(config.name)
        self._forward = Forward(
            config.name,
            self._directory,
            wait_s=config.recovery.wait_s,
            silence_s=config.recovery.silence_s,
        )
        self._asking = asyncio.get_running_loop().create_task(self._keep_asking())

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        guarded = ApiKeys(self._app, self._keys)
        limited = BodyLimit(guarded, max_body_bytes=self._config.limits.max_body_bytes)
        return ResponseTime(limited)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # there is nothing to do at the application's start or end
        if route_path(scope) == "/health" and not self._directory.known:
            body = json.dumps({"status": State.LOADING.value}).encode()
            await send_json(send, body, status=503)
        else:
            await self._forward(scope, receive, send)

    async def _keep_asking(self) -> None:
        """Whoever answers is there; Ray Serve may know of a death later than its clients do."""
        while True:
            self._directory.update(await self._addresses())
            await asyncio.sleep(_ASK_S)

    async def _addresses(self) -> list[Address]:
        try:
            response = self._replicas.broadcast("relay_address")
            answers: list[Any] = await asyncio.to_thread(
                response.results, timeout_s=_ANSWER_S, return_exceptions=True
            )
        except Exception as error:  # no replica is up: Ray has several errors for that
            log.debug("no_replica", model=self._config.name, error=repr(error))
            return []
        return [answer for answer in answers if isinstance(answer, Address)]

    async def __del__(self) -> None:
        with suppress(AttributeError):
            self._asking.cancel()
