"""What must hold for every model that is known, whatever the settings."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from vram.errors import Invalid
from vram.estimate import estimate
from vram.gpu import device_named
from vram.plan import plan
from vram.weights import weight_bytes
from vram.wishes import Wishes

CONFIGS = Path(__file__).parent / "configs"
NAMES = sorted(folder.name for folder in CONFIGS.iterdir())
VRAM = Path(__file__).parents[2] / "vram"
H200 = device_named("H200")

slow = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
models = st.sampled_from(NAMES)
engine_settings = st.fixed_dictionaries(
    {
        "max_num_seqs": st.integers(1, 1024),
        "max_num_batched_tokens": st.integers(1024, 32768),
        "gpu_memory_utilization": st.floats(0.1, 1.0),
        "kv_cache_dtype": st.sampled_from(["auto", "fp8", "int8"]),
        "enforce_eager": st.booleans(),
        "max_loras": st.integers(0, 4),
        "num_speculative_tokens": st.integers(0, 4),
        "enable_prefix_caching": st.booleans(),
    }
)


@slow
@given(name=models, changes=engine_settings, data=st.data())
def test_more_context_never_needs_less(name, changes, data, shape_of, settings_with) -> None:
    shape = shape_of(name)
    tokens = data.draw(st.integers(1, shape.max_context_tokens))
    more = data.draw(st.integers(tokens, shape.max_context_tokens))
    before = estimate(shape, settings_with(max_model_len=tokens, **changes), H200)
    after = estimate(shape, settings_with(max_model_len=more, **changes), H200)
    assert before.sequence_bytes <= after.sequence_bytes
    assert before.needed_bytes <= after.needed_bytes


@slow
@given(
    name=models,
    setting=st.sampled_from(["max_num_seqs", "max_num_batched_tokens"]),
    changes=engine_settings,
    data=st.data(),
)
def test_larger_batches_never_take_less_of_the_device(
    name, setting, changes, data, shape_of, settings_with
) -> None:
    shape = shape_of(name)
    small = data.draw(st.integers(256, 4096))
    values = {**changes, "max_model_len": min(1024, shape.max_context_tokens)}
    more = data.draw(st.integers(small, 8192))
    before = estimate(shape, settings_with(**{**values, setting: small}), H200)
    after = estimate(shape, settings_with(**{**values, setting: more}), H200)
    outside = [found.device_use_under_load_bytes - found.total_bytes for found in (before, after)]
    assert before.fixed_bytes + outside[0] <= after.fixed_bytes + outside[1]


def test_a_few_sequences_more_never_take_less_where_blocks_begin_to_serve_twice(
    shape_of, settings_with
) -> None:
    # The sampler's logits outgrow a forward pass between these.
    taken = [
        estimate(shape_of("qwen2.5-1.5b"), settings_with(max_num_seqs=sequences), H200)
        for sequences in range(1000, 2600, 50)
    ]
    slack = [found.item("allocator_slack").bytes for found in taken]
    assert slack == sorted(slack)


@slow
@given(
    name=models,
    degree=st.sampled_from([1, 2, 4, 8]),
    stages=st.sampled_from([1, 2, 3, 4]),
    expert_parallel=st.booleans(),
    quantization=st.sampled_from([None, "fp8"]),
    rounded=st.booleans(),
)
def test_more_gpus_never_raise_the_weights_of_one(
    name, degree, stages, expert_parallel, quantization, rounded, shape_of, settings_with
) -> None:
    shape = shape_of(name)
    assume(not shape.split_problem(degree) and not shape.split_problem(2 * degree))
    assume(stages < shape.num_layers)

    def held(tensor_parallel: int, pipeline_parallel: int) -> int:
        split = settings_with(
            tensor_parallel_size=tensor_parallel,
            pipeline_parallel_size=pipeline_parallel,
            expert_parallel=expert_parallel,
            quantization=None if shape.quantization else quantization,
        )
        return weight_bytes(shape, split, rounded=rounded)

    assert held(2 * degree, stages) <= held(degree, stages)
    assert held(degree, stages + 1) <= held(degree, stages)


@slow
@given(
    name=models,
    card=st.sampled_from(["T4", "L4", "RTX4090", "A100-80GB", "H200", "B200"]),
    fraction=st.none() | st.floats(0.05, 1.0),
    gpus=st.sampled_from([1, 8]),
)
def test_a_plan_never_exceeds_a_card(name, card, fraction, gpus, shape_of) -> None:
    device = device_named(card)
    try:
        found = plan(shape_of(name), Wishes(gpu_fraction=fraction, max_gpus=gpus), device)
    except Invalid:
        return
    limit_bytes = device.total_bytes * found.gpu_fraction
    assert found.estimate.fits
    assert found.estimate.device_use_under_load_bytes <= limit_bytes


@pytest.mark.parametrize("name", NAMES)
def test_what_an_estimate_holds_is_the_sum_of_its_items(name: str, shape_of, settings_with) -> None:
    shape = shape_of(name)
    found = estimate(shape, settings_with(max_model_len=min(2048, shape.max_context_tokens)), H200)
    counted = sum(item.bytes for item in found.items)
    assert all(item.bytes >= 0 for item in (*found.items, *found.outside, *found.at_peak))
    assert found.total_bytes == counted
    assert found.device_use_under_load_bytes == counted + sum(i.bytes for i in found.outside)


def test_no_module_of_vram_imports_ray_or_torch() -> None:
    modules = [
        ".".join(path.relative_to(VRAM.parent).with_suffix("").parts)
        for path in VRAM.rglob("*.py")
        if path.name != "__init__.py"
    ]
    code = (
        f"import sys\nfor name in {modules!r}: __import__(name)\n"
        "found = {'ray', 'torch', 'vllm', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
