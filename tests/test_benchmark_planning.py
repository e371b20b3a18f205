"""The planner's benchmark has the load that it claims, and its work does not grow unnoticed."""

import pytest

import placement.menu
import vram.budget
import vram.concurrency
import vram.plan
from benchmarks.planning import INVENTORY, NUM_MODELS, requests
from placement.choose import choose
from placement.words import nodes_from_words
from vram.estimate import estimate

# Of 0.1 ms each; 50 models on 1,000 GPUs have 2 s. It was 3,778 when this was written.
MOST_ESTIMATES = 8000


def test_fifty_models_on_a_thousand_gpus_are_few_estimates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, nodes = requests(), nodes_from_words(INVENTORY)
    assert len({request.name for request in asked}) == NUM_MODELS == 50
    assert sum(len(node.gpus) for node in nodes) == 1000
    num_estimates = 0

    def counted(*arguments: object) -> object:
        nonlocal num_estimates
        num_estimates += 1
        return estimate(*arguments)  # type: ignore[arg-type]

    for module in (vram.budget, vram.concurrency, vram.plan, placement.menu):
        monkeypatch.setattr(module, "estimate", counted)
    decision = choose(asked, nodes)
    assert decision.fits
    assert 0 < num_estimates < MOST_ESTIMATES
