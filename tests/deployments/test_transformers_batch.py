import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.demo_model import build_demo_model
from deployments.engines.protocol import Sampling, TokenDelta, TokenRequest
from deployments.errors import Invalid

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from deployments.engines.transformers_batch import Batch  # noqa: E402
from deployments.engines.transformers_sequence import delta_of  # noqa: E402

NUM_TOKENS = 24
IM_END, STOP_SOON = 758, 759  # of the demo model; see cluster/demo_tokens.py


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("models") / "demo"
    build_demo_model(folder)
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def sliding_model() -> Any:
    """Random, with a window shorter than its prompts; float64, so that no two logits are close."""
    config = transformers.MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config).double().eval()


def make_batch(model: Any, **limits: Any) -> Batch:
    defaults = {"max_num_seqs": 16, "max_num_batched_tokens": 1024, "max_model_len": 1024}
    return Batch(model, **{**defaults, **limits})


def request(number: int, **sampling: Any) -> TokenRequest:
    """Prompts of 1 to 120 tokens, each of its own."""
    dice = random.Random(number)
    prompt = tuple(dice.randrange(90) for _ in range(dice.randrange(1, 121)))
    wanted = {"max_tokens": NUM_TOKENS, "temperature": 0.0, **sampling}
    return TokenRequest(
        request_id=f"request-{number}", prompt_token_ids=prompt, sampling=Sampling(**wanted)
    )


def finish(
    batch: Batch,
    requests: Iterable[TokenRequest] = (),
    emitted: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, list[int]]:
    """Add these and run until nothing is left; what was emitted before is part of the answer."""
    answers: dict[str, list[int]] = {}
    for each in requests:
        before = (emitted or {}).get(each.request_id, ())
        answers[each.request_id] = list(before)
        batch.add(each, before)
    for delta in drain(batch):
        answers.setdefault(delta.request_id, []).extend(delta.new_token_ids)
    return answers


def drain(batch: Batch) -> list[TokenDelta]:
    deltas: list[TokenDelta] = []
    while batch.has_work:
        deltas += batch.step().outputs
    return deltas


def alone(model: Any, requests: Iterable[TokenRequest]) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    for each in requests:
        answers |= finish(make_batch(model), [each])
    return answers


def test_a_greedy_answer_is_that_of_generate(model: Any) -> None:
    asked = [request(number) for number in range(4)]
    for each in asked:
        prompt = torch.tensor([each.prompt_token_ids])
        reference = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NUM_TOKENS
        )
        expected = reference[0, prompt.shape[1] :].tolist()
        assert finish(make_batch(model), [each])[each.request_id] == expected


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_num_seqs": 3},
        {"max_num_batched_tokens": 7},
        {"kv_cache_memory_bytes": 2048 * 400},
    ],
    ids=["together", "three at a time", "prompts in pieces", "little cache"],
)
def test_the_company_in_the_batch_changes_no_greedy_answer(model: Any, limits: Any) -> None:
    asked = [request(number) for number in range(12)]
    assert finish(make_batch(model, **limits), asked) == alone(model, asked)


@pytest.mark.parametrize("budget", [5, 1024])
def test_sliding_windows_hold_while_rows_join_and_leave(sliding_model: Any, budget: int) -> None:
    asked = [request(number, max_tokens=5 + number) for number in range(8)]
    expected = {}
    for each in asked:
        prompt = torch.tensor([each.prompt_token_ids])
        output = sliding_model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=each.sampling.max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected[each.request_id] = output[0, prompt.shape[1] :].tolist()
    limited = [
        TokenRequest(
            request_id=each.request_id,
            prompt_token_ids=each.prompt_token_ids,
            sampling=Sampling(
                max_tokens=each.sampling.max_tokens, temperature=0.0, ignore_eos=True
            ),
        )
        for each in asked
    ]
    batch = make_batch(sliding_model, max_num_seqs=4, max_num_batched_tokens=budget)
    assert finish(batch, limited) == expected


def test_requests_that_join_and_leave_between_steps_disturb_nobody(model: Any) -> None:
    asked = [request(number) for number in range(9)]
    expected = alone(model, asked)
    batch = make_batch(model)
    answers: dict[str, list[int]] = {}
    for number, each in enumerate(asked):
        batch.add(each)
        for delta in batch.step().outputs:
            answers.setdefault(delta.request_id, []).extend(delta.new_token_ids)
        if number in (4, 7):
            batch.remove(asked[number - 2].request_id)
    for request_id, tokens in finish(batch).items():
        answers[request_id] += tokens
    gone = {asked[2].request_id, asked[5].request_id}
    assert {k: v for k, v in answers.items() if k not in gone} == {
        k: v for k, v in expected.items() if k not in gone
    }
    assert all(len(answers[request_id]) < NUM_TOKENS for request_id in gone)


@pytest.mark.parametrize("where", ["waiting", "prefilling", "running"])
def test_a_removed_request_says_nothing_more_and_frees_its_place(model: Any, where: str) -> None:
    batch = make_batch(model, max_num_seqs=1, max_num_batched_tokens=10)
    if where == "waiting":
        batch.add(request(0))
    long = TokenRequest(request_id="long", prompt_token_ids=(1,) * 95, sampling=request(0).sampling)
    batch.add(long)
    for _ in range({"waiting": 1, "prefilling": 2, "running": 12}[where]):
        batch.step()
    batch.remove("long")
    batch.remove("nobody")
    assert "long" not in {delta.request_id for delta in drain(batch)}
    assert batch.num_running == batch.num_waiting == 0
    assert finish(batch, [request(1)]) == alone(model, [request(1)])


@pytest.mark.parametrize("num_emitted", [1, 9, NUM_TOKENS - 1])
def test_a_replay_goes_on_after_the_last_emitted_token(model: Any, num_emitted: int) -> None:
    asked = [request(number) for number in range(6)]
    expected = alone(model, asked)
    emitted = {key: tokens[:num_emitted] for key, tokens in expected.items()}
    assert finish(make_batch(model), asked, emitted) == expected


@pytest.mark.parametrize(
    "penalty",
    [{"frequency_penalty": 1.3}, {"presence_penalty": 4.0}, {"repetition_penalty": 1.4}],
    ids=lambda penalty: next(iter(penalty)),
)
def test_penalties_count_what_was_emitted_before_a_replay(model: Any, penalty: Any) -> None:
    asked = request(1, max_tokens=120, **penalty)
    expected = finish(make_batch(model), [asked])
    assert expected != finish(make_batch(model), [request(1, max_tokens=120)])
    emitted = {"request-1": expected["request-1"][:60]}
    assert finish(make_batch(model), [asked], emitted) == expected


@pytest.mark.parametrize("setting", ["frequency_penalty", "presence_penalty"])
def test_a_large_enough_penalty_never_says_a_token_twice(model: Any, setting: str) -> None:
    answer = finish(make_batch(model), [request(3, max_tokens=200, **{setting: 100.0})])
    tokens = answer["request-3"]
    assert len(tokens) == len(set(tokens)) == 200


def test_presence_and_frequency_do_not_count_the_prompt(model: Any) -> None:
    everything = tuple(range(756))
    answers = [
        finish(
            make_batch(model),
            [
                TokenRequest(
                    request_id="a",
                    prompt_token_ids=everything,
                    sampling=Sampling(
                        max_tokens=1,
                        temperature=0.0,
                        presence_penalty=penalty,
                        frequency_penalty=penalty,
                    ),
                )
            ],
        )
        for penalty in (0.0, 100.0)
    ]
    assert answers[0] == answers[1]


def test_the_same_seed_draws_the_same_tokens_in_any_company(model: Any) -> None:
    asked = [request(number, temperature=1.5, seed=number % 2) for number in range(6)]
    expected = alone(model, asked)
    assert finish(make_batch(model), asked) == expected


def test_another_seed_draws_other_tokens(model: Any) -> None:
    answers = [
        finish(make_batch(model), [request(1, temperature=1.5, seed=seed)])["request-1"]
        for seed in range(3)
    ]
    assert answers[0] != answers[1] != answers[2]


def test_a_seeded_replay_draws_what_was_drawn(model: Any) -> None:
    asked = request(1, temperature=1.2, seed=7, top_p=0.9, top_k=50)
    expected = finish(make_batch(model), [asked])
    emitted = {"request-1": expected["request-1"][:10]}
    assert finish(make_batch(model), [asked], emitted) == expected


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}])
def test_sampling_from_one_token_is_greedy(model: Any, narrow: Any) -> None:
    greedy = finish(make_batch(model), [request(2)])
    assert finish(make_batch(model), [request(2, **{"temperature": 3.0, **narrow})]) == greedy


def test_top_k_draws_from_the_k_likeliest_only(model: Any) -> None:
    batch = make_batch(model)
    batch.add(request(2, temperature=5.0, top_k=3, logprobs=3, max_tokens=40))
    for delta in drain(batch):
        (chosen,) = delta.logprobs
        assert chosen.token_id in {token for token, _ in chosen.top}


def stopping(**sampling: Any) -> TokenRequest:
    return TokenRequest(
        request_id="a",
        prompt_token_ids=(1, 2, STOP_SOON, 3),
        sampling=Sampling(**{"max_tokens": 100, "temperature": 0.0, **sampling}),
    )


def test_an_answer_ends_with_its_end_token(model: Any) -> None:
    batch = make_batch(model)
    batch.add(stopping())
    deltas = drain(batch)
    assert deltas[-1].new_token_ids == (IM_END,)
    assert deltas[-1].finish_reason == "stop"
    assert len(deltas) < 100


@pytest.mark.parametrize("setting", [{"ignore_eos": True}, {"min_tokens": 90}])
def test_an_end_token_can_be_ignored_or_put_off(model: Any, setting: Any) -> None:
    batch = make_batch(model)
    batch.add(stopping(**setting))
    tokens = [token for delta in drain(batch) for token in delta.new_token_ids]
    assert len(tokens) >= 90
    assert (IM_END in tokens[:90]) == ("ignore_eos" in setting)


def test_the_context_ends_an_answer(model: Any) -> None:
    batch = make_batch(model, max_model_len=130)
    asked = request(4, max_tokens=1000)
    batch.add(asked)
    deltas = drain(batch)
    assert deltas[-1].finish_reason == "length"
    assert len(asked.prompt_token_ids) + len(deltas) == 130


@pytest.mark.parametrize(
    ("emitted", "reason"),
    [((1,) * NUM_TOKENS, "length"), ((1, IM_END), "stop"), ((1,) * 2000, "length")],
)
def test_a_replay_with_nothing_left_to_say_finishes_at_once(
    model: Any, emitted: tuple[int, ...], reason: str
) -> None:
    batch = make_batch(model)
    batch.add(request(1), emitted)
    (delta,) = drain(batch)
    assert delta.new_token_ids == ()
    assert delta.finish_reason == reason


def test_no_more_run_at_once_than_max_num_seqs(model: Any) -> None:
    batch = make_batch(model, max_num_seqs=3)
    for number in range(8):
        batch.add(request(number))
    most = 0
    while batch.has_work:
        batch.step()
        most = max(most, batch.num_running)
    assert most == 3


def test_a_long_prompt_is_prefilled_in_pieces_while_the_others_go_on(model: Any) -> None:
    batch = make_batch(model, max_num_batched_tokens=10)
    short = TokenRequest(
        request_id="short", prompt_token_ids=(1, 2, 3), sampling=request(0).sampling
    )
    long = TokenRequest(
        request_id="long", prompt_token_ids=(4,) * 100, sampling=request(0).sampling
    )
    batch.add(short)
    batch.step()
    batch.add(long)
    before_the_long_one = 0
    while not any(delta.request_id == "long" for delta in batch.step().outputs):
        before_the_long_one += 1
    assert before_the_long_one == 9


def test_logprobs_are_those_of_the_model_itself(model: Any) -> None:
    asked = request(5, temperature=0.7, seed=1, logprobs=4, frequency_penalty=1.0, max_tokens=6)
    batch = make_batch(model)
    batch.add(asked)
    deltas = drain(batch)
    tokens = [*asked.prompt_token_ids, *(delta.new_token_ids[0] for delta in deltas)]
    with torch.inference_mode():
        reference = model(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
    for step, delta in enumerate(deltas):
        row = reference[len(asked.prompt_token_ids) - 1 + step]
        (chosen,) = delta.logprobs
        assert chosen.token_id == delta.new_token_ids[0]
        assert chosen.logprob == pytest.approx(row[chosen.token_id].item(), abs=1e-3)
        assert [value for _, value in chosen.top] == pytest.approx(
            row.topk(4).values.tolist(), abs=1e-3
        )


def test_no_alternatives_and_no_logprobs_when_none_are_asked_for(model: Any) -> None:
    batch = make_batch(model)
    batch.add(request(1, logprobs=0, max_tokens=1))
    batch.add(request(2, max_tokens=1))
    with_logprobs, without = sorted(drain(batch), key=lambda delta: delta.request_id)
    assert with_logprobs.logprobs[0].top == ()
    assert without.logprobs == ()


def test_a_model_whose_cache_can_not_be_padded_is_refused_by_name() -> None:
    config = transformers.Qwen3NextConfig(num_hidden_layers=4)
    model = SimpleNamespace(
        config=config, forward=lambda: None, generation_config=SimpleNamespace(eos_token_id=1)
    )
    with pytest.raises(Invalid, match=r"qwen3_next.*vllm"):
        make_batch(model)


class Short:
    """A model that has memory for so many columns of all rows together, and says so as torch does.

    `fails_at`: its forward passes that find no memory whatever they need.
    """

    def __init__(
        self, model: Any, *, most_cells: int = 10**9, fails_at: Sequence[int] = ()
    ) -> None:
        self._model = model
        self._most_cells = most_cells
        self._fails_at = set(fails_at)
        self._num_passes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        self._num_passes += 1
        if (
            inputs["attention_mask"].numel() > self._most_cells
            or self._num_passes in self._fails_at
        ):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self._model(**inputs)


@pytest.mark.parametrize("most_cells", [900, 400, 150])
def test_a_batch_that_does_not_fit_goes_on_as_smaller_ones(model: Any, most_cells: int) -> None:
    asked = [request(number) for number in range(12)]
    batch = make_batch(Short(model, most_cells=most_cells))
    assert finish(batch, asked) == alone(model, asked)
    assert batch.num_reliefs > 0
    assert batch.max_num_seqs < 12


@pytest.mark.parametrize("fails_at", [(2,), (3, 5), (9, 10, 11), (20,)])
def test_no_token_is_lost_or_given_twice_wherever_memory_runs_out(
    model: Any, fails_at: Sequence[int]
) -> None:
    asked = [
        *(request(number, logprobs=2) for number in range(6)),
        *(request(number, temperature=1.0, seed=number) for number in range(6, 10)),
    ]
    batch = make_batch(Short(model, fails_at=fails_at), max_num_batched_tokens=256)
    assert finish(batch, asked) == alone(model, asked)
    assert batch.num_reliefs == len(fails_at)


def test_tokens_that_were_chosen_but_not_given_are_taken_back(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log probabilities come after the choice, and need memory too."""
    asked = [request(number, logprobs=2) for number in range(4)]
    expected = alone(model, asked)
    batch = make_batch(model)
    calls = 0

    def scarce(*arguments: Any) -> TokenDelta:
        nonlocal calls
        calls += 1
        if calls == 11:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return delta_of(*arguments)

    monkeypatch.setattr("deployments.engines.transformers_batch.delta_of", scarce)
    assert finish(batch, asked) == expected


def test_memory_that_is_not_enough_for_the_smallest_step_ends_the_engine(model: Any) -> None:
    batch = make_batch(Short(model, fails_at=range(2, 1000)))
    batch.add(request(1))
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        drain(batch)
    assert batch.max_num_batched_tokens <= 64
