"""The same load on Ballast and on vLLM's own server, one after the other, on one GPU.

    python -m benchmarks.gpu_serving --card H100-80GB --output results.json

The models have the real shapes and random weights: the text is noise, the work is real. Both
servers get the same context, sequences and batched tokens, CUDA graphs on, and the whole card.
"""

import json
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from benchmarks import processes, report
from benchmarks.gpu_survival import write_tokenizer
from benchmarks.load import Load
from benchmarks.memory.campaign import describe_host, write_models
from benchmarks.memory.models import CONFIGS
from benchmarks.servers import Endpoint, ServerFailedError, ServerKind, Settings, running
from benchmarks.serving import run_load

REQUESTS_AT = {1: 16, 64: 768, 256: 2048}  # by concurrency
WARM_UP_REQUESTS = 256
MAX_NUM_BATCHED_TOKENS = 8192
UTILIZATION = 0.9
console = Console(width=150)


def main(
    card: Annotated[str, typer.Option(help="As Ballast names it.")],
    output: Annotated[Path, typer.Option()],
    models: Annotated[str, typer.Option(help="Comma-separated.")] = "qwen2.5-0.5b,qwen2.5-7b",
    concurrency: Annotated[str, typer.Option(help="Comma-separated.")] = "1,64,256",
    output_tokens: int = 128,
    max_num_seqs: int = 256,
    limit_s: Annotated[float, typer.Option(help="No server is started after it.")] = 400.0,
) -> None:
    """One table for each model."""
    began_s, date = time.monotonic(), datetime.now(UTC)
    processes.adopt_orphans()
    folder = Path(tempfile.mkdtemp())
    write_models(folder, set(models.split(",")))
    documents: dict[str, Any] = {"host": describe_host()}
    tables = []
    for model in models.split(","):
        write_tokenizer(folder / model, CONFIGS[model]["vocab_size"])
        settings = Settings(
            model_folder=folder / model,
            port=8000,
            max_model_len=8192,
            max_num_seqs=max_num_seqs,
            omp_threads=1,
        )
        measurements = []
        for kind in (_vllm(), _ballast(card)):
            if time.monotonic() - began_s > limit_s:
                console.print(f"{model}, {kind.title}: left out, the time is up")
                continue
            levels = [int(level) for level in concurrency.split(",")]
            try:
                measurements.append(_measure(kind, settings, levels, output_tokens))
            except ServerFailedError as failure:
                console.print(f"left out: {failure}", markup=False, highlight=False)
        if measurements:
            tables.append((model, report.table(measurements)))
            documents[model] = report.document(measurements, settings, command=sys.argv, date=date)
        output.write_text(json.dumps(documents, indent=1) + "\n")
    for model, table in tables:
        console.print(model, table)


def _measure(
    kind: ServerKind, settings: Settings, levels: list[int], output_tokens: int
) -> report.Measurement:
    busy = processes.busy_share()
    (endpoint,) = kind.endpoints
    with running(kind, settings) as server:
        load = Load(
            base_url=server.url + endpoint.path,
            model=endpoint.model,
            concurrency=max(levels),
            num_requests=WARM_UP_REQUESTS,
            output_tokens=output_tokens,
            seed=-1,
        )
        run_load(load)
        results = []
        for level in levels:
            asked = replace(
                load,
                concurrency=level,
                num_requests=REQUESTS_AT.get(level, 8 * level),
                seed=level,
            )
            results.append(run_load(asked))
            console.print("  " + report.sentence(endpoint, results[-1]), highlight=False)
        return report.Measurement(
            round=0,
            endpoint=endpoint,
            busy_before=busy,
            started_in_s=server.started_in_s,
            loads=results,
            memory=processes.measure(),
        )


def _vllm() -> ServerKind:
    def command(settings: Settings, folder: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(settings.model_folder), "--served-model-name", "demo"),
            *("--host", "127.0.0.1", "--port", str(settings.port)),
            *("--dtype", "bfloat16", "--load-format", "dummy"),
            *("--max-model-len", str(settings.max_model_len)),
            *("--max-num-seqs", str(settings.max_num_seqs)),
            *("--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS)),
            *("--gpu-memory-utilization", str(UTILIZATION)),
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
            "device": {"kind": "cuda", "name": card},
            "dtype": "bfloat16",
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
            "gpu_memory_utilization": UTILIZATION,
            "engine_args": {"load_format": "dummy"},
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
