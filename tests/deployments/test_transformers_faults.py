"""The batch that dies to order, over a stub: no model, no Ray."""

from collections.abc import Sequence
from typing import Any

import pytest

from deployments.engines import transformers_faults
from deployments.engines.protocol import Sampling, TokenDelta, TokenRequest, TokenStep
from deployments.engines.transformers_faults import MortalBatch
from deployments.faults import Fault, Rehearsal
from deployments.oom import Cause


class Stub:
    """A token for each request in each step; the third is the last."""

    max_num_seqs = 7

    def __init__(self) -> None:
        self.given: dict[str, int] = {}

    def add(self, request: TokenRequest, emitted: Sequence[int] = ()) -> None:
        self.given[request.request_id] = len(emitted)

    def remove(self, request_id: str) -> None:
        del self.given[request_id]

    def step(self) -> TokenStep:
        self.given = {name: given + 1 for name, given in self.given.items()}
        deltas = tuple(
            TokenDelta(
                request_id=name, new_token_ids=(1,), finish_reason="stop" if given == 3 else None
            )
            for name, given in self.given.items()
        )
        self.given = {name: given for name, given in self.given.items() if given < 3}
        return TokenStep(outputs=deltas)


def batch(**fault: Any) -> MortalBatch:
    told = Fault(cause=Cause.OTHER, message="now", **fault)
    return MortalBatch(Stub(), Rehearsal([told], 1), "no model")


def request(name: str) -> TokenRequest:
    return TokenRequest(
        request_id=name, prompt_token_ids=tuple(name.encode()), sampling=Sampling(max_tokens=3)
    )


def test_it_has_the_face_of_the_batch_in_it() -> None:
    assert batch().max_num_seqs == 7


def test_a_step_is_made_until_so_many_tokens_are_there() -> None:
    mortal = batch(after_tokens=4)
    mortal.add(request("a"))
    mortal.add(request("b"))
    assert [len(mortal.step().outputs) for _ in range(2)] == [2, 2]
    with pytest.raises(RuntimeError, match="now"):
        mortal.step()


@pytest.mark.parametrize("leaves", [True, False])
def test_who_finished_or_left_is_in_no_step(leaves: bool) -> None:
    mortal = batch(after_tokens=1)
    mortal.add(request("a"), (1, 1))
    mortal.step()
    if leaves:
        mortal.add(request("b"))
        mortal.remove("b")
    assert mortal.step().outputs == ()


def test_a_replay_is_known_by_what_its_client_has() -> None:
    mortal = batch(at_replay=True)
    mortal.add(request("a"))
    mortal.step()
    mortal.add(request("b"), (1,))
    with pytest.raises(RuntimeError, match="now"):
        mortal.step()


def test_a_prompt_is_read_by_the_model_s_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bytes:
        def decode(self, token_ids: Sequence[int]) -> str:
            return bytes(token_ids).decode()

    monkeypatch.setattr(transformers_faults, "_tokenizer", lambda path: Bytes())
    mortal = batch(prompt_contains="ois")
    mortal.add(request("noise"))
    mortal.add(request("calm"))
    with pytest.raises(RuntimeError, match="now"):
        mortal.step()


def test_the_request_that_a_fault_waits_for_is_named_before_it_generates() -> None:
    mortal = batch(prompt_contains="p")
    mortal._text = lambda asked: asked.request_id  # type: ignore[method-assign]
    mortal.add(request("a"))
    mortal.step()
    mortal.add(request("p"))
    with pytest.raises(RuntimeError, match="now"):
        mortal.step()
    assert set(mortal.request_ids) == {"a", "p"}
