"""The issue's own limits, on the half of the measured loads that no constant was fitted on."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vram.errors import DoesNotFit
from vram.estimate import estimate
from vram.remedy import refusal, remedies

accuracy = pytest.importorskip("benchmarks.estimator_accuracy", reason="run from the root")
from benchmarks.estimator_loads import Load, device, fitted, read_loads  # noqa: E402
from benchmarks.estimator_tables import markdown  # noqa: E402

LOADS = read_loads()
FAILED = [load for load in LOADS if load.failure]


@pytest.mark.parametrize("limit", accuracy.LIMITS, ids=lambda limit: limit.item)
def test_every_load_of_the_report_half_is_inside_the_limits(limit) -> None:
    found = accuracy.compared(fitted(LOADS, "report"))
    outside = [
        f"{comparison.load.name}: {comparison.error(limit):+.4f}"
        for comparison in found
        if not limit.kept(comparison.error(limit))
    ]
    assert not outside
    assert len(found) >= 12


def test_both_halves_hold_mixtures_of_experts_and_eager_loads() -> None:
    for half in ("fit", "report"):
        found = fitted(LOADS, half)
        assert any(load.shape.routed for load in found)
        assert any(load.settings.enforce_eager for load in found)


@pytest.mark.parametrize("load", FAILED, ids=lambda load: load.name)
def test_a_load_that_failed_is_refused_beforehand_with_a_setting_that_works(load: Load) -> None:
    card = device()
    found = load.estimated(card)
    assert not found.fits
    expected = {
        "No available memory": "No room for the KV cache",
        "To serve at least one request": f"One sequence of {load.settings.max_model_len} tokens",
        "InductorError": "No room for the KV cache",  # the weights are the card
        "out of memory": "No room for the KV cache",
        "Free memory on device": "Under load the device would hold",
    }
    assert found.reason.startswith(next(v for k, v in expected.items() if k in load.failure))
    error = refusal(load.model, load.shape, load.settings, card, "vllm", card.total_bytes)
    assert isinstance(error, DoesNotFit)
    assert error.needed_bytes > error.available_bytes
    assert error.would_fit.startswith("It fits")
    assert error.setting in {
        "gpu_memory_utilization",
        "max_model_len",
        "tensor_parallel_size",
        "max_num_batched_tokens",
        "quantization",
    }


@pytest.mark.parametrize("load", FAILED, ids=lambda load: load.name)
def test_every_remedy_of_a_load_that_failed_fits_when_it_is_pinned(load: Load) -> None:
    card = device()
    found = remedies(load.shape, load.settings, card, "vllm", card.total_bytes)
    assert found
    for remedy in found:
        turned = replace(load.settings, **{remedy.setting: remedy.value}, **dict(remedy.also))
        again = estimate(load.shape, turned, card)
        assert again.fits, (str(remedy), again.reason)
        assert again.device_use_under_load_bytes <= card.total_bytes


def test_a_failed_load_names_the_item_at_fault() -> None:
    too_big = next(load for load in FAILED if load.model == "qwen2.5-72b")
    assert too_big.estimated(device()).reason.endswith("weights 135.4 GiB of it.")


def test_the_hardest_batch_is_estimated_too() -> None:
    for comparison in accuracy.compared(fitted(LOADS, "report")):
        measured = comparison.load.measured.get("device_hard")
        if measured is not None:
            assert comparison.estimated["device_hard"] > 0.99 * measured


def test_a_context_that_is_too_long_is_answered_as_vllm_answers() -> None:
    load = next(load for load in FAILED if "estimated maximum model length" in load.failure)
    longest = int(load.failure.split("estimated maximum model length is ")[1].split(".")[0])
    said = load.estimated(device()).reason
    assert int(said.split("enough for ")[1].split()[0]) == pytest.approx(longest, rel=0.1)


def test_other_formulas_are_further_off() -> None:
    sizes: dict[tuple[str, str], list[float]] = {}
    for load in fitted(LOADS, "report"):
        for name, items in accuracy.errors(load, device()).items():
            for item, error in items.items():
                if error is not None:
                    sizes.setdefault((name, item), []).append(abs(error))
    means = {key: sum(found) / len(found) for key, found in sizes.items()}
    assert len(means) == 3 + 2 + 2 + 3
    for (name, item), mean in means.items():
        if name != "Ballast":
            assert mean > 3 * means["Ballast", item], (name, item)


def test_the_document_has_the_table_that_the_command_makes() -> None:
    comparisons = {half: accuracy.compared(fitted(LOADS, half)) for half in ("fit", "report")}
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    assert markdown(comparisons) in page


def test_a_broken_limit_is_an_exit_code(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["estimator_accuracy"])
    accuracy.main()
    assert "slowest estimate" in capsys.readouterr().out
    strict = replace(accuracy.LIMITS[0], most=0.0001)
    monkeypatch.setattr(accuracy, "LIMITS", (strict,))
    with pytest.raises(SystemExit, match="weights"):
        accuracy.main()
