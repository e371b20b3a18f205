"""Reads vLLM's log of one load. Sizes there are GiB rounded to 0.01; starts nothing."""

import re

NUMBERS = {
    "weight_gib": r"Model loading took ([\d.]+) GiB",
    "peak_activation_gib": r"([\d.]+) ?GiB for peak activation",
    "non_torch_gib": r"([\d.]+) GiB for non-torch",
    "cuda_graph_gib": r"Graph capturing finished in [\d.]+ secs?, took (-?[\d.]+) GiB",
    "cuda_graph_estimate_gib": r"CUDA graph pool memory: .*, ([\d.]+) GiB \(estimated\)",
    "kv_cache_gib": r"Available KV cache memory: (-?[\d.]+) GiB",
    "kv_cache_tokens": r"GPU KV cache size: ([\d,]+) tokens",
    "max_concurrency": r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x",
    "compile_s": r"torch\.compile .*took ([\d.]+) s in total",
    "graph_capture_s": r"Graph capturing finished in ([\d.]+) secs?",
}
WHOLE = {"kv_cache_tokens"}
WORDS = {
    "attention_backend": r"Using (?:AttentionBackendEnum\.)?(\w+)(?: attention)? backend\b",
    "compile_cache": r"(Directly load the compiled graph|Compiling a graph)",
    "moe_backend": r"Using '?(\w+?)'?(?: \w+)? MoE backend",
}
ERROR = re.compile(r"(?:^|\s)((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): .+)$")
# What the parent makes of any death of the engine; never the cause.
WRAPPERS = ("Engine core initialization failed", "Engine core proc", "WorkerProc initialization")
ENGINE_PREFIXES = ("(EngineCore", "(Worker")
MEMORY_LINE = re.compile(r"GiB|out of memory|OutOfMemory")
LINE_CHARACTERS = 400


def numbers(log: str) -> dict[str, float | int]:
    """By the names of evidence/vllm_h200.jsonl; the last of each, absent if never said."""
    found = {name: re.findall(pattern, log) for name, pattern in NUMBERS.items()}
    return {
        name: int(values[-1].replace(",", "")) if name in WHOLE else float(values[-1])
        for name, values in found.items()
        if values
    }


def words(log: str) -> dict[str, str]:
    found = {name: re.findall(pattern, log) for name, pattern in WORDS.items()}
    return {name: values[-1] for name, values in found.items() if values}


def root_cause(log: str) -> str | None:
    """The first error of an engine's process that is not the wrapping of another."""
    engine = "\n".join(line for line in log.splitlines() if line.startswith(ENGINE_PREFIXES))
    errors = error_lines(engine) or error_lines(log)
    return errors[0] if errors else None


def error_lines(log: str) -> list[str]:
    lines = (ERROR.search(line.rstrip()) for line in log.splitlines())
    found = dict.fromkeys(match.group(1)[:LINE_CHARACTERS] for match in lines if match)
    return [line for line in found if not any(wrapper in line for wrapper in WRAPPERS)][:6]


def memory_lines(log: str) -> list[str]:
    lines = [line.split("] ")[-1] for line in log.splitlines() if MEMORY_LINE.search(line)]
    return [line[:LINE_CHARACTERS] for line in dict.fromkeys(lines)][-14:]
