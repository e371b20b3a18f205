"""The models of a serve config, without the rest of it: for commands that start nothing."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.yaml_file import load_yaml, sentence
from deployments.config import ModelConfig
from deployments.errors import Invalid

MODEL_PATH = "deployments.app:build"


def read_model_configs(path: Path) -> tuple[ModelConfig, ...]:
    """Raises `Invalid` with one sentence that begins with the file.

    What Ray Serve says to the rest of the file is for `ballast check`, which imports it.
    """
    try:
        return _models(load_yaml(path))
    except Invalid as error:
        raise Invalid(f"{path}: {error}", error.setting) from None


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
