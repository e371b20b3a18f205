"""`ballast serve` with the demo model alone, and what that says of itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.servers import (
    REPOSITORY,
    Endpoint,
    RunningServer,
    ServerKind,
    Settings,
    program,
)


def one_model(arguments: Mapping[str, object], env: Mapping[str, str] | None = None) -> ServerKind:
    """The config that people start with, and `arguments` of the model besides or instead."""

    def command(settings: Settings, folder: Path) -> list[str]:
        config = yaml.safe_load((REPOSITORY / "serve_configs" / "dev.yaml").read_text())
        config["http_options"]["port"] = settings.port
        config["applications"] = [
            each for each in config["applications"] if each["name"] in ("gateway", "demo")
        ]
        config["applications"][1]["args"] |= {"model": str(settings.model_folder), **arguments}
        path = folder / "demo.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return [program("ballast"), "serve", str(path)]

    endpoint = Endpoint(name="ballast", ready_path="/demo/health")
    return ServerKind(title="Ballast", command=command, env=dict(env or {}), endpoints=(endpoint,))


def status(server: RunningServer) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/demo/status", timeout=30).raise_for_status()
    return dict(answer.json())
