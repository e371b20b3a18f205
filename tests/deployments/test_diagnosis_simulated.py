"""Supervisor and policy against a simulated start-up whose truth is not the estimate."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from simulated_vllm import Story, Truth, run

from deployments.diagnosis import diagnose
from deployments.policy import fixed
from deployments.restarts import RestartLimit
from deployments.supervisor import Supervisor
from vram import defaults
from vram.answers import TIMES_THE_SAME
from vram.case import FP8_KV_CACHE, FP8_WEIGHTS, Model
from vram.changes import FEWEST_BATCHED_TOKENS
from vram.diagnose import MAX_STEPS
from vram.errors import Invalid
from vram.gpu import device_named
from vram.ladder import fixed_ladder
from vram.model import ModelShape
from vram.settings import EngineSettings
from vram.wishes import Wishes

CONFIGS = Path(__file__).parents[1] / "vram/configs"
SHAPES = {
    name: ModelShape.from_config(json.loads((CONFIGS / name / "config.json").read_text()))
    for name in (
        "qwen2.5-0.5b",
        "qwen2.5-7b",
        "llama-3.1-8b",
        "qwen2.5-14b",
        "qwen2.5-32b",
        "mixtral-8x7b",
        "gemma-3-4b",
        "nemotron-h-8b",
    )
}
CARDS = ("T4", "L4", "A100-40GB", "L40S", "H100-80GB", "H200")
ITEMS = (
    "weights",
    "peak_activation",
    "cuda_graphs",
    "non_torch",
    "communication",
    "runner_state",
    "allocator_slack",
    "context",
)
LIMIT = RestartLimit(max_restarts=3, window_s=600.0)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Model, Truth, int]:
    shape = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    device = device_named(draw(st.sampled_from(CARDS)))
    wishes = Wishes(
        max_model_len=draw(st.none() | st.integers(256, shape.max_context_tokens)),
        max_num_seqs=draw(st.none() | st.sampled_from([1, 16, 256])),
        gpu_memory_utilization=draw(st.none() | st.sampled_from([0.5, 0.8, 0.95])),
        enforce_eager=draw(st.none() | st.booleans()),
    )
    try:
        planned = defaults.settings_for(shape, wishes, device, "vllm", 1, 1)
    except Invalid:
        planned = defaults.settings_for(shape, Wishes(), device, "vllm", 1, 1)
        wishes = Wishes()
    allowed = draw(st.sets(st.sampled_from([FP8_KV_CACHE, FP8_WEIGHTS])))
    longest = draw(st.just(0) | st.integers(1, planned.max_model_len))
    truth = Truth(
        shape=shape,
        device=device,
        factors={name: draw(st.floats(0.90, 1.15)) for name in ITEMS},
        others_bytes=int(device.total_bytes * draw(st.sampled_from([0, 0, 0, 0.1, 0.4, 0.8]))),
        takes_fp8_cache=draw(st.booleans()),
    )
    model = Model(
        name="m",
        shape=shape,
        device=device,
        engine="vllm",
        planned=planned,
        limit_bytes=device.total_bytes,
        wishes=wishes,
        allowed=frozenset(allowed),
    )
    return model, truth, longest


def with_diagnose(model: Model, truth: Truth, longest: int) -> Story:
    first = fixed_ladder(model.planned, model.shape, model.device)[0]
    return run(Supervisor(first, diagnose(model), LIMIT), truth, longest)


def with_fixed(model: Model, truth: Truth, longest: int) -> Story:
    def ladder(longest_request_tokens: int):
        return fixed_ladder(
            model.planned, model.shape, model.device, "vllm", longest_request_tokens
        )

    return run(Supervisor(ladder(0)[0], fixed(ladder), LIMIT), truth, longest)


def a_setting_works(model: Model, truth: Truth, longest: int) -> bool:
    """Whether the least of everything that is permitted serves with some share of the card."""
    planned = model.planned
    least = replace(
        planned,
        max_model_len=min(planned.max_model_len, max(1024, longest)),
        max_num_batched_tokens=min(planned.max_num_batched_tokens, FEWEST_BATCHED_TOKENS),
        max_num_seqs=1,
        enforce_eager=True,
    )
    candidates = [least]
    if FP8_WEIGHTS in model.allowed and model.shape.quantization is None and model.device.bfloat16:
        candidates.append(replace(least, quantization="fp8"))
    if FP8_KV_CACHE in model.allowed and model.device.float8:
        candidates += [replace(c, kv_cache_dtype="fp8") for c in candidates]
    pinned = model.wishes.gpu_memory_utilization
    highest = planned.gpu_memory_utilization if pinned else 0.97
    shares = [share / 100 for share in range(1, 98) if share / 100 <= highest + 1e-9]
    return any(
        truth.death(replace(candidate, gpu_memory_utilization=share)) is None
        for candidate in candidates
        for share in shares
    )


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(situation=situations())
def test_it_ends_and_stays_inside_its_bounds(situation: tuple[Model, Truth, int]) -> None:
    model, truth, longest = situation
    story = with_diagnose(model, truth, longest)
    event(f"{'serves' if story.serves else 'ends'} after {story.loads}")
    assert story.loads <= MAX_STEPS + 1
    again = sum(attempt.rung == "the same again" for attempt in story.supervisor.attempts)
    assert len(set(story.tried)) == story.loads - again
    assert again < TIMES_THE_SAME
    for tried in story.tried[1:]:
        assert_within(tried, model, longest)
    assert story.serves or "needs" in story.reason


def assert_within(tried: EngineSettings, model: Model, longest: int) -> None:
    planned = model.planned
    assert min(longest, planned.max_model_len) <= tried.max_model_len <= planned.max_model_len
    assert tried.max_num_seqs <= planned.max_num_seqs
    assert tried.max_num_batched_tokens <= planned.max_num_batched_tokens
    highest = 0.97 if model.wishes.gpu_memory_utilization is None else 0
    assert tried.gpu_memory_utilization <= max(planned.gpu_memory_utilization, highest)
    assert tried.enforce_eager >= planned.enforce_eager
    if FP8_KV_CACHE not in model.allowed:
        assert tried.kv_cache_dtype == planned.kv_cache_dtype
    if FP8_WEIGHTS not in model.allowed:
        assert tried.quantization == planned.quantization
    for name in ("dtype", "tensor_parallel_size", "pipeline_parallel_size"):
        assert getattr(tried, name) == getattr(planned, name)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(situation=situations())
def test_it_serves_wherever_some_setting_works(situation: tuple[Model, Truth, int]) -> None:
    model, truth, longest = situation
    story = with_diagnose(model, truth, longest)
    if not story.serves:
        assert not a_setting_works(model, truth, longest), story.reason


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(situation=situations())
def test_it_keeps_no_less_context_than_fixed(situation: tuple[Model, Truth, int]) -> None:
    model, truth, longest = situation
    old = with_fixed(model, truth, longest)
    if not old.serves:
        return
    new = with_diagnose(model, truth, longest)
    assert new.serves
    assert new.settings.max_model_len >= old.settings.max_model_len


@pytest.fixture(scope="module")
def grid() -> list[tuple[Model, Truth]]:
    """Every model on every card, the truth from 10 % below the estimate to 15 % above."""
    found = []
    for shape in SHAPES.values():
        for card in CARDS:
            device = device_named(card)
            planned = defaults.settings_for(shape, Wishes(), device, "vllm", 1, 1)
            model = Model(
                name="m",
                shape=shape,
                device=device,
                engine="vllm",
                planned=planned,
                limit_bytes=device.total_bytes,
                wishes=Wishes(),
                allowed=frozenset({FP8_KV_CACHE}),
            )
            for factor in (0.9, 1.0, 1.15):
                for others in (0, 0.4):
                    truth = Truth(
                        shape=shape,
                        device=device,
                        factors=dict.fromkeys(ITEMS, factor),
                        others_bytes=int(others * device.total_bytes),
                    )
                    found.append((model, truth))
    return found


def test_it_rescues_more_loads_than_fixed_in_few_steps(grid: list[tuple[Model, Truth]]) -> None:
    counts: Counter[str] = Counter()
    loads = []
    for model, truth in grid:
        old, new = with_fixed(model, truth, 0), with_diagnose(model, truth, 0)
        counts["plain"] += truth.death(model.planned) is None
        counts["fixed"] += old.serves
        counts["diagnose"] += new.serves
        counts["possible"] += new.serves or a_setting_works(model, truth, 0)
        if new.serves:
            loads.append(new.loads)
    print(dict(counts), "of", len(grid), "loads:", Counter(loads))
    assert counts["plain"] < counts["fixed"] < counts["diagnose"] == counts["possible"]
    assert sum(loads) / len(loads) < 3
