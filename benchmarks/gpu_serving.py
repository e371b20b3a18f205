"""The same load on Ballast and on vLLM's own server, by turns, on one GPU.

    python -m benchmarks.gpu_serving --card H200 --output results.json

The model has the real shape and random weights: the text is noise, the work is real. Both servers
run all the time, each with a share of the card, and take turns: a lent machine's processor is by
half faster in one minute than in another, and one after the other would measure that.
"""

import json
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console

from benchmarks import processes, report
from benchmarks.gpu_survival import write_tokenizer
from benchmarks.load import Load
from benchmarks.memory.campaign import describe_host, write_models
from benchmarks.memory.models import CONFIGS
from benchmarks.servers import Endpoint, RunningServer, ServerKind, Settings, all_running
from benchmarks.serving import run_load

REQUESTS_AT = {1: 8, 64: 384, 256: 1024}  # by concurrency
WARM_UP_REQUESTS = 256
MAX_NUM_BATCHED_TOKENS = 8192
SHARE, FRACTION = 0.4, 0.45  # of the card: vLLM's budget, and what the device holds in the end
console = Console(width=150)


def main(
    card: Annotated[str, typer.Option(help="As Ballast names it.")],
    output: Annotated[Path, typer.Option()],
    model: Annotated[str, typer.Option(help="Of benchmarks/memory/models.py.")] = "qwen2.5-0.5b",
    concurrency: Annotated[str, typer.Option(help="Comma-separated.")] = "1,64,256",
    rounds: Annotated[int, typer.Option(min=1, help="The medians are printed.")] = 5,
    output_tokens: int = 128,
    max_num_seqs: int = 256,
) -> None:
    """One table."""
    date = datetime.now(UTC)
    processes.adopt_orphans()
    processes.end_on_sigterm()
    folder = Path(tempfile.mkdtemp())
    write_models(folder, {model})
    write_tokenizer(folder / model, CONFIGS[model]["vocab_size"])
    settings = Settings(
        model_folder=folder / model,
        port=8000,
        max_model_len=8192,
        max_num_seqs=max_num_seqs,
        omp_threads=1,
    )
    plans = [
        Load(
            base_url="",
            model="demo",
            concurrency=level,
            num_requests=REQUESTS_AT.get(level, 4 * level),
            output_tokens=output_tokens,
        )
        for level in map(int, concurrency.split(","))
    ]
    measurements: list[report.Measurement] = []
    with all_running([_vllm(), _ballast(card)], settings) as servers:
        for kind, server in servers:
            warm_up = replace(plans[-1], num_requests=WARM_UP_REQUESTS, seed=-1)
            run_load(replace(warm_up, base_url=server.url + kind.endpoints[0].path))
        for number in range(rounds):
            # Who is first in one round is second in the next.
            for kind, server in servers[:: 1 - 2 * (number % 2)]:
                endpoint = kind.endpoints[0]
                measured = _measure(endpoint, server, plans, number)
                measurements.append(measured)
                for result in measured.loads:
                    console.print("  " + report.sentence(endpoint, result), highlight=False)
                found = report.document(measurements, settings, command=sys.argv, date=date)
                output.write_text(json.dumps({"host": describe_host(), **found}, indent=1) + "\n")
    console.print(model, report.table(measurements))


def _measure(
    endpoint: Endpoint, server: RunningServer, plans: list[Load], number: int
) -> report.Measurement:
    loads = [
        run_load(
            replace(
                plan, base_url=server.url + endpoint.path, seed=1000 * number + plan.concurrency
            )
        )
        for plan in plans
    ]
    return report.Measurement(
        round=number,
        endpoint=endpoint,
        busy_before=0.0,
        started_in_s=server.started_in_s,
        loads=loads,
        memory=None,
    )


def _engine_args(settings: Settings) -> dict[str, object]:
    """What both servers get."""
    return {
        "dtype": "bfloat16",
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
        "gpu_memory_utilization": SHARE,
    }


def _vllm() -> ServerKind:
    def command(settings: Settings, folder: Path) -> list[str]:
        flags = [
            word
            for name, value in _engine_args(settings).items()
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]
        return [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(settings.model_folder), "--served-model-name", "demo"),
            *("--host", "127.0.0.1", "--port", str(settings.port), "--load-format", "dummy"),
            *flags,
        ]

    return ServerKind(
        title="vLLM's own OpenAI server", command=command, endpoints=(Endpoint(name="vllm"),)
    )


def _ballast(card: str) -> ServerKind:
    def command(settings: Settings, folder: Path) -> list[str]:
        model = {
            "name": "demo",
            "model": str(settings.model_folder),
            "engine": "vllm",
            "device": {"kind": "cuda", "name": card, "gpu_fraction": FRACTION},
            "engine_args": {"load_format": "dummy"},
            **_engine_args(settings),
        }
        applications = [
            {"name": "gateway", "route_prefix": "/", "import_path": "deployments.gateway:build"},
            {
                "name": "demo",
                "route_prefix": "/demo",
                "import_path": "deployments.app:build",
                "args": model,
            },
        ]
        path = folder / "gpu.yaml"
        http = {"host": "127.0.0.1", "port": settings.port}
        path.write_text(yaml.safe_dump({"http_options": http, "applications": applications}))
        return [sys.executable, "-m", "cluster.cli", "serve", str(path)]

    return ServerKind(title="Ballast", command=command, endpoints=(Endpoint(name="ballast"),))


if __name__ == "__main__":
    typer.run(main)
