"""`ballast serve` with the demo model alone, and what that says of itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from benchmarks.dev_config import write_dev_config
from benchmarks.servers import Endpoint, RunningServer, ServerKind, Settings, program


def one_model(arguments: Mapping[str, object], env: Mapping[str, str] | None = None) -> ServerKind:
    """The config that people start with, and `arguments` of the model besides or instead."""

    def command(settings: Settings, folder: Path) -> list[str]:
        path = folder / "demo.yaml"
        write_dev_config(
            path,
            port=settings.port,
            model_folder=settings.model_folder,
            models=("demo",),
            arguments=arguments,
        )
        return [program("ballast"), "serve", str(path)]

    endpoint = Endpoint(name="ballast", ready_path="/demo/health")
    return ServerKind(title="Ballast", command=command, env=dict(env or {}), endpoints=(endpoint,))


def status(server: RunningServer) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/demo/status", timeout=30).raise_for_status()
    return dict(answer.json())
