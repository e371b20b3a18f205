"""Which wishes of a model's config would change nothing: those are refused, not ignored."""

from typing import TYPE_CHECKING

from placement.splits import ON_ONE_CARD

if TYPE_CHECKING:
    from deployments.config import ModelConfig


def problem_with_wishes(config: "ModelConfig") -> str:
    """What is wrong with them together, and what to do; empty if nothing is."""
    return _max_gpus(config) or _objective(config) or _context(config) or _loras(config)


def _max_gpus(config: "ModelConfig") -> str:
    if config.max_gpus is None:
        return ""
    fraction = config.device.gpu_fraction
    reasons = (
        (config.device.kind == "cpu", "on a CPU"),
        (config.engine in ON_ONE_CARD, f"with the engine {config.engine}, which runs on one card"),
        (fraction is not None and fraction < 1, "beside device.gpu_fraction: that is one card"),
        (config.tensor_parallel_size is not None, "beside tensor_parallel_size, which pins it"),
    )
    reason = next((reason for holds, reason in reasons if holds), None)
    return f"max_gpus has no effect {reason}: remove one of them" if reason else ""


def _objective(config: "ModelConfig") -> str:
    """`throughput` is what is done without one, so it can't be without effect."""
    device, objective = config.device, config.objective
    if objective is None:
        return ""
    if device.kind == "cpu":
        return (
            "objective has no effect on a CPU, where there are no cards to choose from: remove it"
        )
    split_is_pinned = (
        config.tensor_parallel_size is not None
        or (device.gpu_fraction is not None and device.gpu_fraction < 1)
        or config.engine in ON_ONE_CARD
    )
    if device.name is None:
        return ""
    batch_is_pinned = config.max_num_batched_tokens is not None or config.engine == "transformers"
    if objective == "latency" and split_is_pinned and batch_is_pinned:
        return (
            "objective: latency has no effect where the card, the split and the batched tokens "
            "are given: remove it, or leave one of them to the plan"
        )
    share_is_pinned = device.gpu_fraction is not None or (config.tensor_parallel_size or 1) > 1
    if objective == "cheapest" and share_is_pinned:
        return (
            "objective: cheapest has no effect where the card and its share (or several of them) "
            "are given: remove it, or leave gpu_fraction to the plan"
        )
    return ""


def _context(config: "ModelConfig") -> str:
    """Beside a pin, `context` still says how long the requests are of which there are many."""
    if config.context is None or config.max_model_len is None or config.concurrency is not None:
        return ""
    return "context has no effect beside max_model_len: remove one of them"


def _loras(config: "ModelConfig") -> str:
    if config.max_loras is None:
        named = config.engine_args.get("lora_modules")
        if named and config.engine == "vllm":
            return (
                f"engine_args.lora_modules has no effect without max_loras: write max_loras: "
                f"{len(named) if isinstance(named, list) else 1}, for so many adapters in one batch"
            )
        alone = config.max_lora_rank is not None
        return "max_lora_rank has no effect without max_loras: set both, or none" if alone else ""
    if config.engine != "vllm":
        return f"max_loras has no effect with the engine {config.engine}: remove it, or use vllm"
    return ""
