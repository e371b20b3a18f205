"""Each kind of shortage and the settings that follow it."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from vram.answers import TIMES_THE_SAME
from vram.case import FP8_KV_CACHE, FP8_WEIGHTS, Case, Model, Tried
from vram.diagnose import Exhausted, next_step
from vram.estimate import estimate
from vram.gpu import device_named
from vram.ladder import Rung
from vram.plan import Wishes, plan
from vram.settings import EngineSettings
from vram.shortage import Shortage, ShortageKind
from vram.units import GIB, MIB

Kind = ShortageKind


@pytest.fixture
def model(shape_of) -> Model:
    return a_model(shape_of, max_model_len=8192)


def a_model(
    shape_of: Callable,
    card: str = "L40S",
    name: str = "llama-3.1-8b",
    allowed: frozenset[str] = frozenset({FP8_KV_CACHE}),
    **wishes: object,
) -> Model:
    shape, device = shape_of(name), device_named(card)
    pins = Wishes(**wishes)  # type: ignore[arg-type]
    return Model(
        name=name,
        shape=shape,
        device=device,
        engine="vllm",
        planned=plan(shape, pins, device).settings,
        limit_bytes=device.total_bytes,
        wishes=pins,
        allowed=allowed,
    )


def died(kind: Kind, settings: EngineSettings, **sizes: int) -> Tried:
    return Tried(asked=settings, settings=settings, shortage=Shortage(kind=kind, **sizes))


def after(model: Model, *tried: Tried, longest: int = 0) -> Rung:
    step = next_step(Case(model=model, tried=tried, longest_request_tokens=longest))
    assert isinstance(step, Rung), step
    return step


def after_one(model: Model, kind: Kind, longest: int = 0, **sizes: int) -> Rung:
    return after(model, died(kind, model.planned, **sizes), longest=longest)


def changed(step: Rung, model: Model) -> set[str]:
    """Names of the settings that are not as planned."""
    names = EngineSettings.__dataclass_fields__
    return {n for n in names if getattr(step.settings, n) != getattr(model.planned, n)}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Kind.ACTIVATIONS, {"max_num_batched_tokens"}),
        (Kind.CACHE_ALLOCATION, {"gpu_memory_utilization"}),
        (Kind.RUN_TIME, {"gpu_memory_utilization"}),
        (Kind.OUTSIDE_ALLOCATOR, {"gpu_memory_utilization"}),
        (Kind.GRAPH_CAPTURE, {"max_cudagraph_capture_size"}),
        (Kind.WARM_UP, {"max_num_seqs"}),
        (Kind.UNKNOWN, {"gpu_memory_utilization"}),
        (Kind.WEIGHTS, set()),
        (Kind.DISTURBED, set()),
    ],
)
def test_one_setting_answers_a_shortage(model: Model, kind: Kind, settings: set[str]) -> None:
    step = after_one(model, kind, asked_bytes=256 * MIB, free_bytes=200 * MIB)
    assert changed(step, model) - {"max_num_seqs"} == settings - {"max_num_seqs"}
    assert ("max_num_seqs" in changed(step, model)) >= ("max_num_seqs" in settings)
    assert kind.value in step.reason


def test_the_cache_gets_smaller_by_what_was_missing_and_a_margin(model: Model) -> None:
    total_bytes = model.device.total_bytes
    step = after_one(model, Kind.RUN_TIME, asked_bytes=3 * GIB, free_bytes=GIB)
    share = model.planned.gpu_memory_utilization - step.settings.gpu_memory_utilization
    assert 2 * GIB < share * total_bytes < 3 * GIB
    assert step.price == f"utilisation 0.90 → {step.settings.gpu_memory_utilization:.3f}"


def test_a_cache_in_bytes_shrinks_in_bytes(model: Model) -> None:
    settings = replace(model.planned, kv_cache_memory_bytes=18 * GIB)
    model = replace(model, planned=settings)
    step = after_one(model, Kind.CACHE_ALLOCATION, asked_bytes=3 * GIB, free_bytes=GIB)
    assert changed(step, model) == {"kv_cache_memory_bytes"}
    assert 15 * GIB < (step.settings.kv_cache_memory_bytes or 0) < 16 * GIB


def test_what_was_not_enough_is_doubled(model: Model) -> None:
    first = after_one(model, Kind.RUN_TIME, asked_bytes=GIB, free_bytes=0)
    tried = died(Kind.RUN_TIME, model.planned, asked_bytes=GIB, free_bytes=0)
    again = replace(tried, asked=first.settings, settings=first.settings)
    second = after(model, tried, again)
    shares = [s.gpu_memory_utilization for s in (model.planned, first.settings, second.settings)]
    assert shares[1] - shares[2] == pytest.approx(2 * (shares[0] - shares[1]), abs=0.002)


@pytest.mark.parametrize("kind", [Kind.RUN_TIME, Kind.CACHE_ALLOCATION, Kind.ACTIVATIONS])
def test_memory_in_pieces_is_answered_by_expandable_segments_once(model: Model, kind: Kind) -> None:
    sizes = {"asked_bytes": 512 * MIB, "free_bytes": 100 * MIB, "reserved_bytes": 600 * MIB}
    step = after_one(model, kind, **sizes)
    assert changed(step, model) == {"expandable_segments"}
    second = after(model, died(kind, model.planned, **sizes), died(kind, step.settings, **sizes))
    assert len(changed(second, model)) > 1


def test_the_context_that_the_engine_names_is_taken(shape_of) -> None:
    model = a_model(shape_of, gpu_memory_utilization=0.9, max_model_len=32768)
    step = after_one(
        model, Kind.CONTEXT_TOO_LONG, asked_bytes=4 * GIB, free_bytes=3 * GIB, max_model_len=24576
    )
    assert step.settings == replace(model.planned, max_model_len=24576)
    assert step.price == "context 32768 → 24576 tokens"


def test_an_fp8_cache_is_the_smaller_price_for_more_than_half_of_the_context(shape_of) -> None:
    model = a_model(shape_of, gpu_memory_utilization=0.9, max_model_len=32768)
    sizes = {"asked_bytes": 4 * GIB, "free_bytes": 2 * GIB, "max_model_len": 16208}
    # The engine had 2 GiB for its cache, the half of a sequence in 16 bits.
    dear = after_one(model, Kind.CONTEXT_TOO_LONG, **(sizes | {"free_bytes": 2 * GIB + MIB}))
    assert changed(dear, model) == {"kv_cache_dtype"}
    mid_stream = after_one(model, Kind.CONTEXT_TOO_LONG, longest=9000, **sizes)
    assert changed(mid_stream, model) == {"max_model_len"}
    refused = replace(model, allowed=frozenset())
    assert changed(after_one(refused, Kind.CONTEXT_TOO_LONG, **sizes), refused) == {"max_model_len"}
    pinned = replace(model, wishes=replace(model.wishes, kv_cache_dtype="auto"))
    assert changed(after_one(pinned, Kind.CONTEXT_TOO_LONG, **sizes), pinned) == {"max_model_len"}


def test_a_request_in_flight_is_never_made_too_long(shape_of) -> None:
    model = a_model(shape_of, gpu_memory_utilization=0.9, max_model_len=32768)
    step = after_one(
        model,
        Kind.CONTEXT_TOO_LONG,
        longest=30000,
        asked_bytes=4 * GIB,
        free_bytes=2 * GIB + MIB,
        max_model_len=16208,
    )
    assert step.settings.max_model_len >= 30000


def test_a_larger_share_costs_no_context_where_the_card_has_it(shape_of) -> None:
    model = replace(a_model(shape_of), wishes=Wishes())
    low = replace(model.planned, gpu_memory_utilization=0.45)
    model = replace(model, planned=low)
    found = estimate(model.shape, low, model.device)
    step = after_one(
        model,
        Kind.CONTEXT_TOO_LONG,
        asked_bytes=found.sequence_bytes,
        free_bytes=max(found.cache_left_bytes, MIB),
        max_model_len=64,
    )
    assert changed(step, model) == {"gpu_memory_utilization"}
    assert step.settings.gpu_memory_utilization > 0.45
    pinned = replace(model, wishes=Wishes(gpu_memory_utilization=0.45))
    step = after_one(
        pinned,
        Kind.CONTEXT_TOO_LONG,
        asked_bytes=found.sequence_bytes,
        free_bytes=GIB,
        max_model_len=8192,
    )
    assert step.settings.gpu_memory_utilization == 0.45


def test_no_cache_blocks_never_asks_for_a_smaller_share(shape_of) -> None:
    model = a_model(shape_of, card="L4", max_model_len=4096)
    step = after_one(model, Kind.NO_CACHE_BLOCKS)
    assert step.settings.gpu_memory_utilization >= model.planned.gpu_memory_utilization
    assert step.settings != model.planned


def test_what_is_free_bounds_the_share(model: Model) -> None:
    total_bytes = model.device.total_bytes
    step = after_one(
        model,
        Kind.NOT_FREE,
        asked_bytes=int(0.9 * total_bytes),
        free_bytes=int(0.7 * total_bytes),
        total_bytes=total_bytes,
    )
    assert changed(step, model) == {"gpu_memory_utilization"}
    assert 0.6 < step.settings.gpu_memory_utilization < 0.7


def test_a_card_that_another_holds_nearly_all_of_ends_with_the_reason(model: Model) -> None:
    total_bytes = model.device.total_bytes
    tried = died(
        Kind.NOT_FREE, model.planned, asked_bytes=int(0.9 * total_bytes), free_bytes=8 * GIB
    )
    step = next_step(Case(model=model, tried=(tried,)))
    assert isinstance(step, Exhausted)
    assert "needs" in step.reason
    assert "has 8.5" in step.reason  # 8 and the driver's own
    assert FP8_WEIGHTS in step.reason


def test_as_many_sequences_as_the_engine_has_states(shape_of) -> None:
    model = a_model(shape_of, card="H100", name="nemotron-h-8b")
    most = model.planned.max_num_seqs // 3
    step = after_one(model, Kind.TOO_MANY_SEQUENCES, max_num_seqs=most)
    assert step.settings == replace(model.planned, max_num_seqs=most)


def test_graphs_get_fewer_then_none_then_the_cache_smaller(model: Model) -> None:
    sizes = {"asked_bytes": 64 * MIB, "free_bytes": 0}
    tried: tuple[Tried, ...] = (died(Kind.GRAPH_CAPTURE, model.planned, **sizes),)
    names = []
    while not names or names[-1] != "smaller KV cache":
        step = after(model, *tried)
        names.append(step.name)
        tried = (*tried, died(Kind.GRAPH_CAPTURE, step.settings, **sizes))
    assert names[0] == "fewer CUDA graphs"
    assert names[-2] == "no CUDA graphs"
    assert len(names) <= 5


@pytest.mark.parametrize("kind", [Kind.DISTURBED, Kind.WEIGHTS])
def test_the_same_again_is_bounded(model: Model, kind: Kind) -> None:
    tried: tuple[Tried, ...] = (died(kind, model.planned),)
    for _ in range(TIMES_THE_SAME - 1):
        step = after(model, *tried)
        assert step.settings == model.planned
        tried = (*tried, died(kind, model.planned))
    step = after(model, *tried)
    assert step.settings != model.planned


def test_weights_that_can_not_fit_need_permission_for_another_format(shape_of) -> None:
    model = a_model(shape_of, card="L4", max_model_len=2048)
    too_big = replace(model, shape=shape_of("qwen2.5-14b"))
    tried = died(Kind.WEIGHTS, model.planned, asked_bytes=512 * MIB, free_bytes=100 * MIB)
    ended = next_step(Case(model=too_big, tried=(tried,)))
    assert isinstance(ended, Exhausted)
    assert "tensor_parallel_size 2" in ended.reason
    assert "a card of 3" in ended.reason
    allowed = replace(too_big, allowed=frozenset({FP8_WEIGHTS}))
    assert changed(after(allowed, tried), allowed) == {"quantization"}


def test_a_refused_step_is_undone_and_not_taken_again(shape_of) -> None:
    model = a_model(shape_of, gpu_memory_utilization=0.9, max_model_len=32768)
    sizes = {"asked_bytes": 4 * GIB, "free_bytes": 2 * GIB + MIB, "max_model_len": 16208}
    first = died(Kind.CONTEXT_TOO_LONG, model.planned, **sizes)
    step = after(model, first)
    assert step.settings.kv_cache_dtype == "fp8"
    refused = Tried(asked=step.settings, settings=step.settings, shortage=None)
    second = after(model, first, refused)
    assert second.settings == replace(model.planned, max_model_len=16208)
    third = after(
        model, first, refused, died(Kind.CONTEXT_TOO_LONG, second.settings, max_model_len=8000)
    )
    assert third.settings.kv_cache_dtype == "auto"


def test_settings_that_the_pre_check_had_made_smaller_are_the_ones_that_died(model: Model) -> None:
    ran_with = replace(model.planned, gpu_memory_utilization=0.7)
    shortage = Shortage(kind=Kind.RUN_TIME, asked_bytes=GIB, free_bytes=0)
    step = after(model, Tried(asked=model.planned, settings=ran_with, shortage=shortage))
    assert step.settings.gpu_memory_utilization < 0.7


def test_settings_that_led_nowhere_are_not_asked_for_again(shape_of) -> None:
    model = a_model(shape_of, gpu_memory_utilization=0.9, max_model_len=32768)
    shortage = Shortage(
        kind=Kind.CONTEXT_TOO_LONG, asked_bytes=4 * GIB, free_bytes=3 * GIB, max_model_len=24576
    )
    first = Tried(asked=model.planned, settings=model.planned, shortage=shortage)
    step = after(model, first)
    # The check before the load put the context back, say, and it ended as before.
    second = after(model, first, replace(first, asked=step.settings))
    assert second.settings not in (step.settings, model.planned)
