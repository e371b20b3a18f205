"""Reads a serve config as a whole and refuses what Ray Serve would silently ignore or override."""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from cluster.model_configs import MODEL_PATH
from cluster.yaml_file import load_yaml, sentence
from deployments.config import GatewayConfig, ModelConfig
from deployments.errors import Invalid
from deployments.guards.api_keys import load_api_keys

GATEWAY_PATH = "deployments.gateway:build"
_ARGS: dict[str, type[BaseModel]] = {MODEL_PATH: ModelConfig, GATEWAY_PATH: GatewayConfig}

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What a file in `serve_configs/` says, checked."""

    path: Path
    host: str
    port: int
    models: tuple[ModelConfig, ...]
    gateway: GatewayConfig | None

    @property
    def is_local(self) -> bool:
        """Only this machine can connect."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def num_replicas(self) -> int:
        """Of all applications together."""
        gateways = 0 if self.gateway is None else self.gateway.num_replicas
        return gateways + sum(model.num_replicas for model in self.models)

    def without_keys(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """Whom anybody may ask, if replicas inherit this environment."""
        names = [
            model.name
            for model in self.models
            if model.api_keys_file is None and not load_api_keys(None, {**env, **model.env})
        ]
        gateway = self.gateway
        if gateway and gateway.api_keys_file is None and not load_api_keys(None, env):
            names.insert(0, "the gateway")
        return tuple(names)


def read_serve_config(path: Path) -> ServeConfig:
    """Raises `Invalid` with one sentence that names the place and says what to change."""
    try:
        return _checked(path, load_yaml(path))
    except Invalid as error:
        raise Invalid(f"{path}: {error}", error.setting) from None


def _checked(path: Path, document: Any) -> ServeConfig:
    if not isinstance(document, dict):
        raise Invalid("a serve config is a mapping with `applications:`")
    _only_known(document, ServeDeploySchema, "")
    http = _http_options(document.get("http_options") or {})
    applications = document.get("applications") or []
    if not isinstance(applications, list):
        raise Invalid("applications is a list")
    args = [_application(given, f"applications.{n}") for n, given in enumerate(applications)]
    models = tuple(each for each in args if isinstance(each, ModelConfig))
    gateways = [each for each in args if isinstance(each, GatewayConfig)]
    if not models:
        raise Invalid(f"no application serves a model: add one with import_path: {MODEL_PATH}")
    if len(gateways) > 1:
        raise Invalid("two applications are the gateway, and there is one /: remove one of them")
    # Ray's default; a gateway has no other need of a name.
    names = [application.get("name", "default") for application in applications]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Invalid(f"two applications have the name {twice!r}; give one another name")
    _validated(ServeDeploySchema, document, "")
    return ServeConfig(
        path=path,
        host=http.host,
        port=http.port,
        models=models,
        gateway=gateways[0] if gateways else None,
    )


def _http_options(given: Any) -> HTTPOptionsSchema:
    if not isinstance(given, dict):
        raise Invalid("http_options is a mapping with `host:` and `port:`")
    _only_known(given, HTTPOptionsSchema, "http_options.")
    if not given.get("host"):
        raise Invalid(
            "http_options.host is missing, and Ray would listen on every interface: "
            "write host: 127.0.0.1, or 0.0.0.0 if that is meant"
        )
    http = _validated(HTTPOptionsSchema, given, "http_options")
    if given.get("port") is True or not 1 <= http.port <= 65535:
        raise Invalid(f"http_options.port is {given['port']!r}; a port is 1 to 65535")
    return http


def _application(application: Any, where: str) -> BaseModel:
    if not isinstance(application, dict):
        raise Invalid(f"{where} is a mapping with `import_path:` and `args:`")
    _only_known(application, ServeApplicationSchema, f"{where}.")
    _check_deployments(application.get("deployments") or [], f"{where}.deployments")
    import_path = application.get("import_path")
    if not isinstance(import_path, str) or import_path not in _ARGS:
        known = " or ".join(_ARGS)
        raise Invalid(f"{where}.import_path is {import_path!r}; it is {known}")
    args = _validated(_ARGS[import_path], application.get("args") or {}, f"{where}.args")
    prefix = application.get("route_prefix", "/")
    name = application.get("name")
    if isinstance(args, ModelConfig) and (prefix != f"/{args.name}" or name != args.name):
        raise Invalid(
            f"{where} serves {args.name!r}, so it needs name: {args.name} and "
            f"route_prefix: /{args.name} (it has {name!r} and {prefix!r})"
        )
    if isinstance(args, GatewayConfig) and prefix != "/":
        raise Invalid(f"{where} is the gateway, so it needs route_prefix: / (not {prefix!r})")
    return args


def _check_deployments(deployments: Any, where: str) -> None:
    if not isinstance(deployments, list):
        raise Invalid(f"{where} is a list of mappings with `name:`")
    for number, deployment in enumerate(deployments):
        if not isinstance(deployment, dict):
            raise Invalid(f"{where}.{number} is a mapping with `name:`")
        by_hand = [key for key in deployment if str(key).startswith("placement_group")]
        if by_hand:
            raise Invalid(f"remove {by_hand[0]} from {where}.{number}: the plan owns the placement")
        _only_known(deployment, DeploymentSchema, f"{where}.{number}.")


def _only_known(given: dict[Any, Any], schema: type[BaseModel], where: str) -> None:
    """Ray ignores a key that it does not know, and a typo becomes the default."""
    known = set(schema.model_fields)
    for key in given:
        if key not in known:
            raise Invalid(
                f"unknown key {where}{key}; known are {', '.join(sorted(known))}", str(key)
            )


def _validated(schema: type[M], given: Any, where: str) -> M:
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        raise Invalid(sentence(error, where)) from None
    except Invalid as error:
        raise Invalid(f"{where}: {error}", error.setting) from None
