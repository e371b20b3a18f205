"""What runs inside vLLM's own processes: a black box, and requests that go on where they were.

vLLM loads it in EngineCore and in every worker (entry point `vllm.general_plugins`), but also in
the replica and, while its cache of model facts is cold, in a process that only looks at a model. It
does nothing unless Ballast started the process as an engine's.
"""

import ctypes
import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from deployments.engines import black_box, vllm_faults, vllm_groups, vllm_wake
from deployments.engines.leftovers import note_names
from deployments.engines.vllm_memory import keep_memory_lines

BLACK_BOX = "BALLAST_BLACK_BOX"  # the file that dying processes write to
EMITTED = "ballast_emitted"  # in `extra_args`: how many tokens at the prompt's end are output
PROMPT = "ballast_prompt"  # in `extra_args`: how many tokens the client's own prompt has
SHARE_CORES = "BALLAST_SHARE_CORES"  # "1": the model computes on the cores that serve it

_PR_SET_PDEATHSIG = 1


def register() -> None:
    """Called by vLLM at the start of each of its processes, perhaps more than once."""
    path = os.environ.get(BLACK_BOX)
    if path is None or _only_looks_at_a_model():
        return
    _end_with_parent()
    # The faults first: what they raise is written down as if vLLM had raised it.
    if not black_box.is_open():
        vllm_faults.install()
    if black_box.install(path):
        keep_memory_lines(Path(path))
        note_names()
        _resume_requests()
        if os.environ.get(SHARE_CORES) == "1":
            vllm_wake.install()
            vllm_groups.install()


def _only_looks_at_a_model() -> bool:
    """vLLM's `python -m vllm.model_executor.models.registry`, which inherits the environment."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    return main is not None and main.name == "vllm.model_executor.models.registry"


def _end_with_parent() -> None:
    """The kernel kills this process when its parent dies: an orphan keeps its memory for ever."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _resume_requests() -> None:
    """Let a replayed request enter the engine as a preempted one comes back from its queue.

    vLLM has no field for "already generated": emitted tokens can only be sent as prompt. But then
    penalties, `min_tokens`, `max_tokens` and grammars would count from nothing. So the tokens are
    sent at the prompt's end with their number in `extra_args`, and are split off again here.
    """
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    make_request = Request.from_engine_core_request.__func__  # type: ignore[attr-defined]

    def from_engine_core_request(cls: Any, request: Any, block_hasher: Any) -> Any:
        num_emitted = _num_emitted(request.sampling_params)
        if not num_emitted:
            return make_request(cls, request, block_hasher)
        emitted = request.prompt_token_ids[-num_emitted:]
        request.prompt_token_ids = request.prompt_token_ids[:-num_emitted]
        resumed = make_request(cls, request, block_hasher)
        resumed.append_output_token_ids(emitted)
        return resumed

    Request.from_engine_core_request = classmethod(from_engine_core_request)

    create_grammar = StructuredOutputManager._create_grammar

    def advanced_grammar(self: Any, request: Any) -> Any:
        grammar = create_grammar(self, request)
        if _num_emitted(request.sampling_params):
            grammar.accept_tokens(request.request_id, list(request.output_token_ids))
        return grammar

    StructuredOutputManager._create_grammar = advanced_grammar

    # Model runner V2 takes a request's tokens with their division into prompt and output. V1 knows
    # that division only for requests that it already has, so it is made again in the worker.
    make_data = NewRequestData.from_request.__func__  # type: ignore[attr-defined]

    def from_request(
        cls: Any, /, request: Any, block_ids: Any, prefill_token_ids: Any = None, **options: Any
    ) -> Any:
        data = make_data(cls, request, block_ids, prefill_token_ids, **options)
        if prefill_token_ids is None and _num_emitted(request.sampling_params):
            data.prompt_token_ids = list(request.all_token_ids)
        return data

    NewRequestData.from_request = classmethod(from_request)

    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    post_init = CachedRequestState.__post_init__

    def split_prompt(self: Any) -> None:
        num_emitted = _num_emitted(self.sampling_params)
        if num_emitted and self.prompt_token_ids is not None and not self.output_token_ids:
            # Tokens beyond the replayed ones belong to a preemption since: they are output, too.
            num_prompt = self.sampling_params.extra_args[PROMPT]
            self.output_token_ids = self.prompt_token_ids[num_prompt:]
            self.prompt_token_ids = self.prompt_token_ids[:num_prompt]
            if self.generator is not None:
                self.generator.manual_seed(seed_behind(self.sampling_params.seed, num_emitted))
        post_init(self)

    CachedRequestState.__post_init__ = split_prompt


def seed_behind(seed: int, num_emitted: int) -> int:
    """Of the draws that go on there: with its own seed a request would draw its beginning again.

    Model runner V1 only: V2 makes the random numbers of each token from the seed and its place.
    """
    words = f"{seed}:{num_emitted}".encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=4).digest())  # the CPU reads 32 bits


def _num_emitted(sampling_params: Any) -> int:
    if sampling_params is None or not sampling_params.extra_args:
        return 0
    return int(sampling_params.extra_args.get(EMITTED, 0))
