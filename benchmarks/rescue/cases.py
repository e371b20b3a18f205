"""The loads: a model, settings that a person might ask for, and who else is on the card.

Made for an H200 (139.8 GiB); another card's shares would need other numbers. Starts nothing.
"""

from dataclasses import dataclass, field
from typing import Any

GIB = 2**30
SERVES, ENDS = "serves", "ends with the reason"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Another process on the card."""

    share: float  # of the card's memory, held before the engine starts
    leaves_bytes: int | None = None  # under load it takes more, until no more than this is free
    is_orphan: bool = False  # marked as an engine of a Ballast server that was killed


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    model: str  # of benchmarks/memory/models.py, random weights
    asked: dict[str, Any]  # as vLLM calls them
    tenant: Tenant | None = None
    num_requests: int = 1  # 1: does it serve at all
    expected: str = SERVES


def _case(name: str, model: str, utilization: float, context_tokens: int, **more: Any) -> Case:
    facts = {key: more.pop(key) for key in ("tenant", "num_requests", "expected") if key in more}
    asked = {
        "gpu_memory_utilization": utilization,
        "max_model_len": context_tokens,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 8192,
        "enforce_eager": True,
        **more,
    }
    return Case(name=name, model=model, asked=asked, **facts)


CASES = (
    _case("weights above the share", "qwen2.5-32b", 0.3, 8192),
    _case(
        "weights above the card",
        "mixtral-8x22b",
        0.9,
        8192,
        expected=ENDS,
    ),
    _case("no cache blocks", "llama-3.1-8b", 0.12, 8192, max_num_batched_tokens=32768),
    _case("context too long", "llama-3.1-8b", 0.2, 131072),
    _case(
        "context too long, card shared",
        "llama-3.1-8b",
        0.2,
        131072,
        tenant=Tenant(share=0.78),
    ),
    _case("co-tenant holds 40 %", "qwen2.5-7b", 0.9, 32768, tenant=Tenant(share=0.4)),
    _case("co-tenant holds 80 %", "qwen2.5-7b", 0.9, 32768, tenant=Tenant(share=0.8)),
    _case(
        "co-tenant holds 80 %, large model",
        "qwen2.5-32b",
        0.9,
        8192,
        tenant=Tenant(share=0.8),
        expected=ENDS,
    ),
    _case(
        "orphan of a killed server",
        "qwen2.5-7b",
        0.9,
        32768,
        tenant=Tenant(share=0.9, is_orphan=True),
    ),
    _case(
        "cache larger than what is free",
        "qwen2.5-7b",
        0.9,
        32768,
        kv_cache_memory_bytes=126 * GIB,
    ),
    _case(
        "graph capture without room",
        "qwen2.5-7b",
        0.9,
        32768,
        kv_cache_memory_bytes=1238 * GIB // 10,
        max_num_seqs=512,
        enforce_eager=False,
    ),
    _case(
        "activations above what is free",
        "qwen2.5-7b",
        0.15,
        32768,
        max_num_batched_tokens=131072,
        max_num_seqs=1024,
        tenant=Tenant(share=0.84),
    ),
    _case(
        "another process takes the rest under load",
        "qwen2.5-7b",
        0.6,
        8192,
        max_num_seqs=256,
        tenant=Tenant(share=0.05, leaves_bytes=GIB // 16),
        num_requests=1024,
    ),
)
BY_NAME = {case.name: case for case in CASES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one case in one mode; sizes in bytes and tokens, times in seconds."""

    case: str
    mode: str
    served: bool
    reason: str  # why not
    seconds: float  # until the first answer, or until it was clear that there is none
    max_model_len: int | None = None
    kv_cache_tokens: int | None = None
    steps: list[str] = field(default_factory=list)  # each life: its settings' price, its end
    requests_ok: int = 0
    requests_failed: int = 0
