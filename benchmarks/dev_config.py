"""The config that people start with, for a benchmark's server."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
GATEWAY = "gateway"


def write_dev_config(
    path: Path,
    *,
    port: int,
    model_folder: Path,
    models: Collection[str],
    arguments: Mapping[str, Any],
) -> None:
    """`dev.yaml` with these of its models at the common `/v1`, and `arguments` of each besides."""
    config = yaml.safe_load((REPOSITORY / "serve_configs" / "dev.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"] = [
        each for each in config["applications"] if each["name"] in (GATEWAY, *models)
    ]
    for application in config["applications"]:
        if application["name"] != GATEWAY:
            application["args"] |= {"model": str(model_folder), **arguments}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
