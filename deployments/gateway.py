"""One `/v1` in front of all models: finds the model in the body and passes bytes through.

With HAProxy most requests never come here (`cluster.haproxy` sends them straight to their model);
what does is every request under a plain `serve run`, lists over all models, and mistakes.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import structlog
from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from deployments import inference_stream
from deployments.config import RESERVED_NAMES, GatewayConfig
from deployments.errors import Busy
from deployments.guards.api_keys import ApiKeys, load_api_keys
from deployments.guards.body_limit import BodyLimit
from deployments.guards.response_time import RESPONSE_TIME
from deployments.metrics import merge
from deployments.openai.errors import ErrorAnswer, RequestError, UnknownModel, answer_to

MODEL_DEPLOYMENT = "Model"  # the name of the deployment in every model's application
_MODELS_TTL_S = 2.0
_REPORT_S = 5.0  # how long a replica may take to say how it is
_HOP_HEADERS = frozenset(
    {"connection", "content-length", "host", "transfer-encoding", "keep-alive"}
)
log = structlog.get_logger(__name__)


class Gateway:
    """The application at `/`."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._keys = load_api_keys(config.api_keys_file)
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=5.0), limits=_LIMITS)
        self._handles: dict[str, DeploymentHandle] = {}
        self._models: tuple[str, ...] = ()
        self._models_at_s = 0.0

    async def __serve_build_asgi_app__(self) -> Any:
        app = FastAPI(title="Ballast", openapi_url=None, redirect_slashes=False)
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/status", self.status, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        app.add_api_route("/v1/models", self.list_models, methods=["GET"])
        app.add_api_route("/v1/models/{model}", self.show_model, methods=["GET"])
        app.add_api_route("/v1/{path:path}", self.forward, methods=["POST"])
        app.add_api_route(inference_stream.PATH, self.forward, methods=["POST"])
        # A path with a prefix comes here only if no application has that prefix.
        app.add_api_route("/{model}/v1/{path:path}", self.unknown, methods=["GET", "POST"])
        app.add_api_route("/{model}" + inference_stream.PATH, self.unknown, methods=["POST"])
        app.add_exception_handler(HTTPException, _no_such_route)
        guarded = ApiKeys(app, self._keys)
        return BodyLimit(guarded, max_body_bytes=self._config.limits.max_body_bytes)

    async def health(self) -> Response:
        return JSONResponse({"status": "ok"})

    async def status(self) -> Response:
        """Every replica of every model; a model that can't answer is listed with the reason."""
        names = await self.models()
        reports = await asyncio.gather(*(self._broadcast(name, "status") for name in names))
        return JSONResponse({"models": dict(zip(names, reports, strict=True))})

    async def metrics(self) -> Response:
        names = await self.models()
        texts = await asyncio.gather(*(self._broadcast(name, "metrics") for name in names))
        flat = [text for replicas in texts for text in replicas if isinstance(text, str)]
        return PlainTextResponse(merge(flat), media_type=CONTENT_TYPE_LATEST)

    async def list_models(self, request: Request) -> Response:
        names = await self.models()
        answers = await asyncio.gather(*(self._get(request, name, "/v1/models") for name in names))
        data = [card for answer in answers for card in answer.get("data", [])]
        return JSONResponse({"object": "list", "data": data})

    async def show_model(self, request: Request, model: str) -> Response:
        if model not in await self.models():
            return await self._unknown(model)
        cards = (await self._get(request, model, "/v1/models")).get("data", [])
        card = next((card for card in cards if card["id"] == model), None)
        return JSONResponse(card) if card else await self._unknown(model)

    async def forward(self, request: Request) -> Response:
        field = "modelId" if request.url.path.startswith("/api/") else "model"
        body = await request.body()
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError) as error:
            return _refusal(RequestError(f"the body is not JSON in UTF-8: {error}"))
        model = parsed.get(field) if isinstance(parsed, dict) else None
        if not isinstance(model, str):
            return _refusal(RequestError(f"{field} is missing: name the model", field))
        if model not in await self.models():
            return await self._unknown(model)
        return await self._pass(request, model, body)

    async def unknown(self, request: Request, model: str) -> Response:
        if request.url.path == inference_stream.PATH:
            raise HTTPException(405, headers={"allow": "POST"})
        if model in RESERVED_NAMES:
            raise HTTPException(404)
        return await self._unknown(model)

    async def models(self) -> tuple[str, ...]:
        """The applications that serve a model, by name; asked of Ray Serve every few seconds."""
        now_s = time.monotonic()
        if now_s - self._models_at_s > _MODELS_TTL_S:
            status = await asyncio.to_thread(serve.status)
            self._models = tuple(
                sorted(
                    n for n, a in status.applications.items() if MODEL_DEPLOYMENT in a.deployments
                )
            )
            self._models_at_s = now_s
        return self._models

    async def _pass(self, request: Request, model: str, body: bytes) -> Response:
        headers = [(k, v) for k, v in request.headers.raw if k.decode() not in _HOP_HEADERS]
        url = f"{_front_url()}/{model}{request.url.path}"
        upstream = self._client.build_request("POST", url, headers=headers, content=body)
        try:
            answer = await self._sent(upstream, model)
        except httpx.TransportError as error:
            busy = Busy(f"the model {model!r} can't be reached: {error}", retry_after_s=5)
            return _refusal(busy)
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP_HEADERS}
        return StreamingResponse(_bytes(answer), status_code=answer.status_code, headers=kept)

    async def _sent(self, upstream: httpx.Request, model: str) -> httpx.Response:
        """The beginning of the model's answer, asked for again where its replica died before it.

        Then it is Ray's front that answers, which lacks what every answer of a replica has.
        """
        for pause_s in _PAUSES_S:
            try:
                answer = await self._client.send(upstream, stream=True)
            except httpx.TransportError as error:
                log.warning("replica_lost", model=model, error=repr(error))
            else:
                if answer.status_code not in _FRONT_FAILED or RESPONSE_TIME in answer.headers:
                    return answer
                log.warning("replica_lost", model=model, status=answer.status_code)
                await answer.aclose()
            await asyncio.sleep(pause_s)
        return await self._client.send(upstream, stream=True)

    async def _get(self, request: Request, model: str, path: str) -> dict[str, Any]:
        headers = {k: v for k, v in request.headers.items() if k in ("authorization", "x-api-key")}
        try:
            answer = await self._client.get(
                f"{_front_url()}/{model}{path}", headers=headers, timeout=5.0
            )
        except httpx.TransportError:
            return {}  # it is starting or gone: a list shows the models that answer
        return answer.json() if answer.status_code == 200 else {}

    async def _broadcast(self, model: str, method: str) -> list[Any]:
        if model not in self._handles:
            self._handles[model] = serve.get_deployment_handle(MODEL_DEPLOYMENT, app_name=model)
        try:
            # Made on this loop, collected off it: `results` blocks.
            response = self._handles[model].broadcast(method)
            answers: list[Any] = await asyncio.to_thread(
                response.results, timeout_s=_REPORT_S, return_exceptions=True
            )
        except Exception as error:
            answers = [error]
        # One that is gone says nothing of the others.
        return [_unreachable(model, a) if isinstance(a, Exception) else a for a in answers]

    async def _unknown(self, model: str) -> Response:
        return _refusal(UnknownModel(model, ", ".join(await self.models()) or "none yet"))


def _unreachable(model: str, error: Exception) -> dict[str, str]:
    return {
        "model": model,
        "state": "unreachable",
        "reason": f"{type(error).__name__}: {error}",
    }


# Ray's front notices a death at the first try, and lets the later ones wait for a new replica.
_PAUSES_S = (0.2, 1.0, 3.0)
_FRONT_FAILED = frozenset({500, 502, 503, 504})
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=256)


async def _no_such_route(request: Request, error: Exception) -> Response:
    """What the router says of a path or a method that it does not know."""
    assert isinstance(error, HTTPException)
    path, headers = request.url.path, Headers(error.headers or {})
    match error.status_code:
        case 404:
            message = f"There is no {path} here."
        case 405:
            message = f"{path} takes {headers['allow']}, not {request.method}."
        case _:
            message = error.detail
    return _response(ErrorAnswer(status=error.status_code, message=message, headers=headers))


def _refusal(error: Exception) -> Response:
    return _response(answer_to(error))


def _response(answer: ErrorAnswer) -> Response:
    return Response(answer.body, answer.status, dict(answer.headers), "application/json")


async def _bytes(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()


def _front_url() -> str:
    """This node's own Serve front, which knows the replicas of every model."""
    from ray.serve.context import _get_global_client

    return f"http://127.0.0.1:{_get_global_client().http_config.port}"


def build(args: GatewayConfig) -> serve.Application:
    """The import path of the application at `/`."""
    keys = args.api_keys_file
    args = args.model_copy(update={"api_keys_file": keys and keys.absolute()})
    deployment = serve.deployment(name="Gateway")(serve.ingress()(Gateway))
    return deployment.options(
        num_replicas=args.num_replicas,
        ray_actor_options={"num_cpus": args.replica_cpus},
        max_ongoing_requests=args.limits.max_ongoing_requests,
    ).bind(args)
