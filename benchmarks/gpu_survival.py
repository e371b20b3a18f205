"""Two models on one card, one of them killed under load: what the clients and the card see.

    python -m benchmarks.gpu_survival --card H200 --output results.json

The models have the real shapes and random weights: the text is noise. Needs the GPU for itself.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import pynvml
import typer
import yaml

from benchmarks.load import Load, run_load
from benchmarks.memory.campaign import write_models
from benchmarks.memory.models import CONFIGS

PORT = 8000
START_S = 300.0
SHARES = {"big": ("qwen2.5-7b", 0.6), "small": ("qwen2.5-0.5b", 0.25)}
LOAD = {"concurrency": 16, "output_tokens": 256}
KILLED_AFTER_S = 2.0


def main(
    card: Annotated[str, typer.Option(help="as Ballast names it")],
    output: Annotated[Path, typer.Option()],
    requests: int = 600,
) -> None:
    folder = Path(tempfile.mkdtemp())
    names = {model for model, _ in SHARES.values()}
    write_models(folder, names)
    for name in names:
        write_tokenizer(folder / name, CONFIGS[name]["vocab_size"])
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump(_config(folder, card)))
    log = output.with_suffix(".log")
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "serve", str(config)],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            for name in SHARES:
                _wait(server, name)
            report = asyncio.run(_measure(requests))
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(90)
    report["device_bytes_after_the_end"] = _used_bytes()
    output.write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


def write_tokenizer(folder: Path, num_tokens: int) -> None:
    """Bytes, and a word of its own for every other token, so that any answer has a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"\u0120t{index}" for index in range(len(words), num_tokens)]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def _config(models: Path, card: str) -> dict[str, Any]:
    applications: list[dict[str, Any]] = [
        {"name": "gateway", "route_prefix": "/", "import_path": "deployments.gateway:build"}
    ]
    for name, (folder, share) in SHARES.items():
        args = {
            "name": name,
            "model": str(models / folder),
            "engine": "vllm",
            "device": {"kind": "cuda", "name": card, "gpu_fraction": share},
            "dtype": "bfloat16",
            "max_model_len": 8192,
            "enforce_eager": True,
            "engine_args": {"load_format": "dummy"},
        }
        applications.append(
            {
                "name": name,
                "route_prefix": f"/{name}",
                "import_path": "deployments.app:build",
                "args": args,
            }
        )
    return {"http_options": {"host": "127.0.0.1", "port": PORT}, "applications": applications}


async def _measure(requests: int) -> dict[str, Any]:
    status = {name: _status(name) for name in SHARES}
    undisturbed, expected = await _run(requests // 10)
    victim = status["big"]["measured"]["process_ids"][0]

    async def kill() -> None:
        await asyncio.sleep(KILLED_AFTER_S)
        os.kill(victim, signal.SIGKILL)

    (disturbed, texts), _ = await asyncio.gather(_run(requests), kill())
    same = sum(text == want != "" for text, want in zip(texts, expected, strict=False))
    end = _status("big")
    return {
        "command": " ".join(sys.argv),
        "versions": _versions(),
        "card": _card(),
        "models": {
            name: {key: report[key] for key in ("estimate", "measured", "settings")}
            for name, report in status.items()
        },
        "undisturbed": undisturbed,
        "killed": disturbed,
        "same_text": f"{same} of the first {len(expected)}",
        "requests": end["requests"],
        "events": end["events"],
    }


async def _run(requests: int) -> tuple[dict[str, Any], list[str]]:
    """Figures, and the texts as hashes; the same number has the same prompt in every run."""
    load = Load(base_url=f"http://127.0.0.1:{PORT}/v1", model="big", num_requests=requests, **LOAD)
    result = await run_load(load)
    kept = ("num_requests", "failed", "output_tokens", "tokens_per_s", "wall_s", "ttft_p99_ms")
    figures = {key: getattr(result, key) for key in kept}
    return {**figures, "device_bytes": _used_bytes()}, result.text_hashes


def _status(name: str) -> dict[str, Any]:
    answer = httpx.get(f"http://127.0.0.1:{PORT}/{name}/status", timeout=30)
    return dict(answer.raise_for_status().json())


def _wait(server: "subprocess.Popen[bytes]", name: str) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and server.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{PORT}/{name}/health", timeout=3).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise SystemExit(f"{name} did not start")


def _versions() -> dict[str, str]:
    import ray
    import torch
    import vllm

    return {"ray": ray.__version__, "torch": torch.__version__, "vllm": vllm.__version__}


def _card() -> dict[str, Any]:
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    return {
        "name": pynvml.nvmlDeviceGetName(handle),
        "total_bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).total,
        "cores": psutil.cpu_count(),
    }


def _used_bytes() -> int:
    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)


if __name__ == "__main__":
    typer.run(main)
