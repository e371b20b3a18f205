"""Notes of vLLM's outputs, from which another replica's front is told what this one was."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deployments.relay.copies import Copy

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.outputs import LogprobsLists


class VLLMNotation:
    """Notation[EngineCoreRequest, EngineCoreOutput]: tokens, how it ended, log probabilities.

    Log probabilities of the prompt, and what pooling models give, are not noted: they come anew.
    """

    def key(self, copy: Copy, request: "EngineCoreRequest") -> str:
        """The request's name without the random end that vLLM gives it; `1_` is its choice."""
        external = request.external_req_id or request.request_id
        choice, found, _ = request.request_id.partition(external)
        return choice + external if found else request.request_id

    def can_continue(self, request: "EngineCoreRequest") -> bool:
        params = request.sampling_params
        return params is None or params.prompt_logprobs is None

    def write(self, delta: "EngineCoreOutput") -> Any:
        reason = None if delta.finish_reason is None else int(delta.finish_reason)
        logprobs = None if delta.new_logprobs is None else _written(delta.new_logprobs)
        return [list(delta.new_token_ids), reason, delta.stop_reason, logprobs]

    def read(self, request_id: str, note: Any) -> Sequence["EngineCoreOutput"]:
        from vllm.v1.engine import EngineCoreOutput, FinishReason

        token_ids, reason, stop_reason, logprobs = note
        return [
            EngineCoreOutput(
                request_id=request_id,
                new_token_ids=token_ids,
                new_logprobs=None if logprobs is None else _read(logprobs),
                finish_reason=None if reason is None else FinishReason(reason),
                stop_reason=stop_reason,
            )
        ]

    def step(self, deltas: Sequence["EngineCoreOutput"]) -> "EngineCoreOutputs":
        from vllm.v1.engine import EngineCoreOutputs

        return EngineCoreOutputs(outputs=list(deltas))


def _written(logprobs: "LogprobsLists") -> list[Any]:
    return [
        logprobs.logprob_token_ids.tolist(),
        logprobs.logprobs.tolist(),
        logprobs.sampled_token_ranks.tolist(),
    ]


def _read(written: Sequence[Any]) -> "LogprobsLists":
    import numpy as np
    from vllm.v1.outputs import LogprobsLists

    token_ids, logprobs, ranks = written
    return LogprobsLists(
        np.array(token_ids, dtype=np.int32),
        np.array(logprobs, dtype=np.float32),
        np.array(ranks, dtype=np.int32),
        None,
    )
