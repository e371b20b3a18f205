"""Reads a serve config as a whole and refuses what Ray Serve would silently ignore or override."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from deployments.config import GatewayConfig, ModelConfig
from deployments.errors import Invalid

MODEL_PATH = "deployments.app:build"
GATEWAY_PATH = "deployments.gateway:build"
_ARGS: dict[str, type[BaseModel]] = {MODEL_PATH: ModelConfig, GATEWAY_PATH: GatewayConfig}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What a file in `serve_configs/` says, checked."""

    path: Path
    host: str
    port: int
    models: tuple[ModelConfig, ...]
    gateway: GatewayConfig | None


def read_serve_config(path: Path) -> ServeConfig:
    """Raises `Invalid` with one sentence that names the place and says what to change."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Invalid(f"{path}: there is no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Invalid(f"{path}: this is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise Invalid(f"{path}: a serve config is a mapping with `applications:`")
    _only_known(path, document, ServeDeploySchema, "")
    http = document.get("http_options") or {}
    applications = document.get("applications") or []
    if not isinstance(http, dict) or not isinstance(applications, list):
        raise Invalid(f"{path}: http_options is a mapping and applications is a list")
    models: list[ModelConfig] = []
    gateway = None
    for number, application in enumerate(applications):
        args = _application(path, application, f"applications.{number}")
        if isinstance(args, ModelConfig):
            models.append(args)
        elif isinstance(args, GatewayConfig):
            gateway = args
    names = [model.name for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Invalid(f"{path}: two applications serve the name {twice!r}; give one another name")
    return ServeConfig(
        path=path,
        host=str(http.get("host", "127.0.0.1")),
        port=int(http.get("port", 8000)),
        models=tuple(models),
        gateway=gateway,
    )


def _application(path: Path, application: Any, where: str) -> BaseModel:
    if not isinstance(application, dict):
        raise Invalid(f"{path}: {where} is a mapping with `import_path:` and `args:`")
    _only_known(path, application, ServeApplicationSchema, f"{where}.")
    for deployment in application.get("deployments") or []:
        by_hand = [key for key in deployment if key.startswith("placement_group")]
        if by_hand:
            raise Invalid(
                f"{path}: remove {by_hand[0]} from {where}.deployments: the plan owns the placement"
            )
    import_path = application.get("import_path")
    if import_path not in _ARGS:
        known = " or ".join(_ARGS)
        raise Invalid(f"{path}: {where}.import_path is {import_path!r}; it is {known}")
    try:
        args = _ARGS[import_path].model_validate(application.get("args") or {})
    except ValidationError as error:
        raise Invalid(f"{path}: {_sentence(error, where)}") from None
    except Invalid as error:
        raise Invalid(f"{path}: {where}.args: {error}") from None
    prefix = application.get("route_prefix", "/")
    name = application.get("name")
    if isinstance(args, ModelConfig) and (prefix != f"/{args.name}" or name != args.name):
        raise Invalid(
            f"{path}: {where} serves {args.name!r}, so it needs name: {args.name} and "
            f"route_prefix: /{args.name} (it has {name!r} and {prefix!r})"
        )
    if isinstance(args, GatewayConfig) and prefix != "/":
        raise Invalid(
            f"{path}: {where} is the gateway, so it needs route_prefix: / (not {prefix!r})"
        )
    return args


def _only_known(path: Path, given: dict[str, Any], schema: type[BaseModel], where: str) -> None:
    """Ray ignores a key that it does not know, and a typo becomes the default."""
    known = set(schema.model_fields)
    for key in given:
        if key not in known:
            raise Invalid(
                f"{path}: unknown key {where}{key}; known are {', '.join(sorted(known))}", str(key)
            )


def _sentence(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in (where, "args", *first["loc"]))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {place}: remove it or correct its spelling{more}"
    if first["type"] == "missing":
        return f"{place} is missing{more}"
    return f"{place}: {first['msg'].removeprefix('Value error, ')}{more}"
