"""Faults inside vLLM's own processes: EngineCore and its workers die as the config asks for it.

The plugin installs it where the replica left faults in the environment, and nowhere else.
"""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel

from deployments.faults import Fault, InBatch, Rehearsal, carry_out
from deployments.phases import LOADING, WORKER_METHODS, Phase

FAULTS = "BALLAST_FAULTS"  # JSON of `_Told`


class _Told(BaseModel):
    life: int
    faults: tuple[Fault, ...]


def environment(faults: Sequence[Fault], life: int) -> dict[str, str]:
    """What the processes of this life have to find; nothing where there is nothing to do."""
    own = tuple(fault for fault in faults if fault.life in (None, life))
    if not own:
        return {}
    return {FAULTS: _Told(life=life, faults=own).model_dump_json(exclude_unset=True)}


def install() -> None:
    """In a process of vLLM. Before the black box, which then sees what is raised here."""
    text = os.environ.get(FAULTS)
    if not text:
        return
    told = _Told.model_validate_json(text)
    rehearsal = Rehearsal(told.faults, told.life)
    _rehearse_planning(rehearsal)
    _rehearse_workers(rehearsal)


def _rehearse_planning(rehearsal: Rehearsal) -> None:
    """EngineCore's own part of a load. A worker does not have the module, and does not plan."""
    core: Any = sys.modules.get("vllm.v1.engine.core")
    if core is None:
        return
    plan = core.get_kv_cache_configs

    # Its name is what says in a traceback that the cache was being planned.
    def get_kv_cache_configs(*args: Any, **options: Any) -> Any:
        carry_out(rehearsal.entered(Phase.KV_PLANNING))
        return plan(*args, **options)

    core.get_kv_cache_configs = get_kv_cache_configs


def _rehearse_workers(rehearsal: Rehearsal) -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    make = WorkerBase.__init__

    @functools.wraps(make)
    def make_mortal(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        if self.rank == 0:
            _rehearse_worker(self, rehearsal)

    WorkerBase.__init__ = make_mortal  # type: ignore[method-assign]


def _rehearse_worker(worker: Any, rehearsal: Rehearsal) -> None:
    for name, phase in WORKER_METHODS.items():
        if phase in LOADING:
            setattr(worker, name, _entering(getattr(worker, name), phase, rehearsal))
    init_device = worker.init_device

    @functools.wraps(init_device)
    def init_device_and_runner() -> None:
        init_device()
        runner = worker.model_runner
        if hasattr(runner, "capture_model"):
            runner.capture_model = _entering(runner.capture_model, Phase.GRAPH_CAPTURE, rehearsal)

    worker.init_device = init_device_and_runner
    steps, execute_model = Steps(rehearsal, lambda ids: _text(worker, ids)), worker.execute_model

    @functools.wraps(execute_model)
    def execute_model_or_die(scheduler_output: Any) -> Any:
        steps.begin(scheduler_output)
        return execute_model(scheduler_output)

    worker.execute_model = execute_model_or_die


def _entering(method: Callable[..., Any], phase: Phase, rehearsal: Rehearsal) -> Callable[..., Any]:
    @functools.wraps(method)
    def entering(*args: Any, **options: Any) -> Any:
        carry_out(rehearsal.entered(phase))
        return method(*args, **options)

    return entering


class Steps:
    """The steps of a worker, as vLLM's scheduler orders them; `text` is a prompt's."""

    def __init__(self, rehearsal: Rehearsal, text: Callable[[Sequence[int]], str]) -> None:
        self._rehearsal = rehearsal
        self._text = text
        self._requests: dict[str, InBatch] = {}
        self._known_tokens: dict[str, int] = {}  # prompt, and output of a replayed one

    def begin(self, scheduled: Any) -> None:
        """Die now, or count what this step will give out."""
        for request_id in scheduled.finished_req_ids:
            self._requests.pop(request_id, None)
            self._known_tokens.pop(request_id, None)
        computed = dict(
            zip(
                scheduled.scheduled_cached_reqs.req_ids,
                scheduled.scheduled_cached_reqs.num_computed_tokens,
                strict=True,
            )
        )
        for new in scheduled.scheduled_new_reqs:
            self._take_in(new)
            computed[new.req_id] = new.num_computed_tokens
        batch = [self._requests[i] for i in scheduled.num_scheduled_tokens if i in self._requests]
        carry_out(self._rehearsal.stepping(batch))
        # A part of a long prompt gives out nothing.
        self._rehearsal.generated(
            sum(
                computed.get(request_id, 0) + num_tokens >= self._known_tokens.get(request_id, 0)
                for request_id, num_tokens in scheduled.num_scheduled_tokens.items()
            )
        )

    def _take_in(self, new: Any) -> None:
        from deployments.engines.vllm_plugin import EMITTED

        extra = (new.sampling_params and new.sampling_params.extra_args) or {}
        token_ids = list(new.prefill_token_ids or new.prompt_token_ids or ())
        self._known_tokens[new.req_id] = len(token_ids)
        self._requests[new.req_id] = InBatch(
            prompt=self._text(token_ids) if self._rehearsal.reads_prompts else "",
            is_replayed=bool(extra.get(EMITTED)),
        )


def _text(worker: Any, token_ids: Sequence[int]) -> str:
    return str(_tokenizer(worker.model_config.tokenizer).decode(token_ids))


@functools.cache
def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)
