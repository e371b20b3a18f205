"""A decision as JSON for machines: sizes in bytes, per GPU. English only."""

import dataclasses
from typing import Any

from cluster.plan_command import Answer
from placement.choose import Placed, Unplaced
from placement.explain import Explanation
from placement.options import Option, Refused
from vram.errors import DoesNotFit, Invalid
from vram.plan import Plan


def document(answer: Answer) -> dict[str, Any]:
    decision = answer.decision
    return {
        "fits": answer.fits,
        "inventory": [
            {
                "card": kind.device.name,
                "total_bytes": kind.device.total_bytes,
                "gpus": kind.total,
                "most_on_a_node": kind.most_on_a_node,
                "nvlink": kind.nvlink,
            }
            for kind in decision.kinds
        ],
        "placed": [
            _placed(placed, answer.explanations[placed.request.name]) for placed in decision.placed
        ],
        "unplaced": [_unplaced(unplaced) for unplaced in decision.unplaced],
    }


def _placed(placed: Placed, explanation: Explanation) -> dict[str, Any]:
    return {
        "model": placed.request.name,
        "replica": placed.replica,
        "objective": placed.request.objective,
        "slots": [dataclasses.asdict(slot) for slot in placed.slots],
        "nodes_with_room": placed.num_fitting_nodes,
        "full_nodes": [{"reason": reason, "nodes": number} for reason, number in placed.full_nodes],
        **_plan(placed.plan),
        "notes": list(placed.plan.notes),
        "passed_over": [_option(option) for option in placed.passed_over],
        "refused": [_refused(refused) for refused in explanation.refused],
        "not_taken": [_option(option) for option in explanation.not_taken],
        "next_smaller_card": _smaller(explanation),
        "ladder": [
            {
                "name": rung.name,
                "price": rung.price,
                "skipped_reason": rung.skipped_reason,
                "settings": dataclasses.asdict(rung.settings),
            }
            for rung in explanation.ladder
        ],
        "floor": dataclasses.asdict(explanation.floor),
    }


def _plan(plan: Plan) -> dict[str, Any]:
    estimated = plan.estimate
    return {
        "engine": plan.engine,
        "card": plan.device.name,
        "gpu_fraction": plan.gpu_fraction,
        "settings": dataclasses.asdict(plan.settings),
        "items": {item.name: item.bytes for item in (*estimated.items, *estimated.outside)},
        "total": estimated.total_bytes,
        "device_use_under_load": estimated.device_use_under_load_bytes,
        "kv_cache_tokens": estimated.kv_cache_tokens,
    }


def _option(option: Option) -> dict[str, Any]:
    settings = option.plan.settings
    return {
        "card": option.plan.device.name,
        "gpu_fraction": option.plan.gpu_fraction,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "max_model_len": settings.max_model_len,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "comfortable": option.comfortable,
    }


def _refused(refused: Refused) -> dict[str, Any]:
    return {
        "card": refused.device.name,
        "tensor_parallel_size": refused.tensor_parallel_size,
        "pipeline_parallel_size": refused.pipeline_parallel_size,
        "needed_bytes": refused.needed_bytes,
        "available_bytes": refused.available_bytes,
        "problem": refused.problem,
    }


def _smaller(explanation: Explanation) -> dict[str, Any] | None:
    smaller = explanation.smaller
    if smaller is None:
        return None
    return {
        "card": smaller.device.name,
        "fits": smaller.plan is not None,
        "changes": [dataclasses.asdict(change) for change in smaller.changes],
        "refused": _refused(smaller.refused) if smaller.refused else None,
    }


def _unplaced(unplaced: Unplaced) -> dict[str, Any]:
    error = unplaced.error
    found: dict[str, Any] = {
        "model": unplaced.request.name,
        "replica": unplaced.replica,
        "reason": str(error),
        "setting": error.setting if isinstance(error, Invalid) else "",
    }
    if isinstance(error, DoesNotFit):
        found |= {"needed_bytes": error.needed_bytes, "available_bytes": error.available_bytes}
    return found
