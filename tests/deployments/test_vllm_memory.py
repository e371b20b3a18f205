"""vLLM's own lines about memory, in the words of the versions that we run with."""

import logging
from pathlib import Path

import pytest

from deployments.engines.vllm_memory import MemoryLines, lines_beside, read_reported, reported
from vram.units import GIB, gib_to_bytes

# gpu_worker.py and kv_cache_utils.py of 0.26, on an H200.
VLLM_026 = (
    "Model loading took 14.29 GiB memory and 4.412345 seconds",
    "Available KV cache memory: 109.15 GiB",
    "GPU KV cache size: 2,043,840 tokens",
    "Graph capturing finished in 11 secs, took 0.89 GiB",
    "Free memory on device (139.23/139.8 GiB) on startup. Desired GPU memory utilization is "
    "(0.9, 125.82 GiB). Actual usage is 14.29 GiB for weight, 2.15 GiB for peak activation, "
    "0.22 GiB for non-torch memory, and 0.89 GiB for CUDAGraph memory. Replace "
    "gpu_memory_utilization config with `--kv-cache-memory=116123456789` (108.15 GiB) to fit into "
    "requested memory, or `--kv-cache-memory=130000000000` (121.5 GiB) to fully utilize gpu "
    "memory. Current kv cache memory in use is 109.15 GiB.",
)
# 0.29 says weights and non-torch in one.
VLLM_029 = (
    *VLLM_026[:2],
    "GPU KV cache size: 2,043,840 tokens, Maximum concurrency for 8,192 tokens per request: "
    "249.49x",
    VLLM_026[3],
    "Free memory on device (139.23/139.8 GiB) on startup. Desired GPU memory utilization is "
    "(0.9, 125.82 GiB). Actual usage is 14.51 GiB for consumed memory (weights + non-torch), "
    "2.15 GiB for peak activation, and 0.89 GiB for CUDAGraph memory. Replace …",
)
CPU_029 = (
    "Explicitly set (0.28/22.9) GiB for KV cache on node 0.",
    "GPU KV cache size: 294,912 tokens, Maximum concurrency for 2,048 tokens per request: 144.00x",
)


@pytest.mark.parametrize("lines", [VLLM_026, VLLM_029], ids=["0.26", "0.29"])
def test_every_item_is_read_from_either_version(lines: tuple[str, ...]) -> None:
    assert reported(lines) == {
        "weights": gib_to_bytes(14.29),
        "peak_activation": gib_to_bytes(2.15),
        "non_torch": pytest.approx(gib_to_bytes(0.22), abs=2),
        "cuda_graphs": gib_to_bytes(0.89),
        "kv_cache": gib_to_bytes(109.15),
        "kv_cache_tokens": 2_043_840,
    }


def test_on_the_cpu_there_is_a_cache_and_no_more() -> None:
    assert reported(CPU_029) == {"kv_cache": gib_to_bytes(0.28), "kv_cache_tokens": 294_912}


def test_what_was_not_said_is_not_there() -> None:
    assert reported(("Model loading took forever", "GPU KV cache size: many tokens", "")) == {}


def test_of_several_workers_the_fullest_counts_and_the_smallest_cache() -> None:
    lines = [f"Model loading took {size} GiB memory and 1.0 seconds" for size in ("7.1", "7.3")]
    lines += [f"Available KV cache memory: {size} GiB" for size in ("50.5", "50.0")]
    assert reported(lines) == {"weights": gib_to_bytes(7.3), "kv_cache": 50 * GIB}


def test_lines_about_memory_reach_the_file_of_the_life_and_others_do_not(tmp_path: Path) -> None:
    path = lines_beside(tmp_path / "black_box.jsonl")
    assert read_reported(path) == {}
    logger = logging.getLogger("vllm.test_memory")
    logger.setLevel(logging.INFO)
    handler = MemoryLines(path)
    logger.addHandler(handler)
    try:
        logger.info("Available KV cache memory: %s GiB", "1.5")
        logger.info("Starting to load model")
        logger.error("CUDA out of memory. Tried to allocate 2.00 GiB")
    finally:
        logger.removeHandler(handler)
    assert path.read_text() == "Available KV cache memory: 1.5 GiB\n"
    assert read_reported(path) == {"kv_cache": gib_to_bytes(1.5)}
