"""The models of a serve config, without the rest of it: for commands that start nothing."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deployments.config import ModelConfig
from deployments.errors import Invalid
from vram.units import MIB

MODEL_PATH = "deployments.app:build"
# A config is some kilobytes; what is above this is something else.
LARGEST_FILE_BYTES = 4 * MIB


def read_model_configs(path: Path) -> tuple[ModelConfig, ...]:
    """Raises `Invalid` with one sentence that begins with the file.

    What Ray Serve says to the rest of the file is for `ballast check`, which imports it.
    """
    try:
        return _models(load_yaml(path))
    except Invalid as error:
        raise Invalid(f"{path}: {error}", error.setting) from None


def load_yaml(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE_BYTES + 1)
    except FileNotFoundError:
        raise Invalid("there is no such file") from None
    except OSError as error:
        raise Invalid(f"it can't be read: {error.strerror}") from None
    if len(content) > LARGEST_FILE_BYTES:
        raise Invalid(f"it is above {LARGEST_FILE_BYTES // MIB} MiB and is not read")
    try:
        return yaml.safe_load(content.decode())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Invalid(f"this is not YAML: {' '.join(str(error).split())}") from None


def _models(document: Any) -> tuple[ModelConfig, ...]:
    if not isinstance(document, dict):
        raise Invalid("a serve config is a mapping with `applications:`")
    applications = document.get("applications") or []
    if not isinstance(applications, list):
        raise Invalid("applications is a list")
    models = tuple(
        _model(application.get("args"), f"applications.{number}.args")
        for number, application in enumerate(applications)
        if isinstance(application, dict) and application.get("import_path") == MODEL_PATH
    )
    if not models:
        raise Invalid(f"no application serves a model: add one with import_path: {MODEL_PATH}")
    return models


def _model(args: Any, where: str) -> ModelConfig:
    try:
        return ModelConfig.model_validate(args or {})
    except ValidationError as error:
        raise Invalid(sentence(error, where)) from None
    except Invalid as error:
        raise Invalid(f"{where}: {error}", error.setting) from None


def sentence(error: ValidationError, where: str) -> str:
    """The first of pydantic's problems, with the place in the file."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in (where, *first["loc"]) if part != "")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {place}: remove it or correct its spelling{more}"
    if first["type"] == "missing":
        return f"{place} is missing{more}"
    return f"{place}: {first['msg'].removeprefix('Value error, ')}{more}"
