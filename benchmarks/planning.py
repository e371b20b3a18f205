"""How long the planner takes: 50 models on 1,000 GPUs of three kinds, CPU seconds of one process.

python -m benchmarks.planning [--rounds 5]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from placement.choose import Decision, choose
from placement.explain import explain
from placement.requests import OBJECTIVES, Request
from placement.words import nodes_from_words
from vram.errors import Invalid
from vram.model import ModelShape
from vram.wishes import Wishes

CONFIGS = Path(__file__).resolve().parents[1] / "tests/vram/configs"
NUM_MODELS = 50
INVENTORY = "60x8xH200, 40x8xH100, 25x8xL40S"
LIMIT_S = 2.0


def requests() -> list[Request]:
    """Fifty different models of the test data, every objective, some with wishes."""
    found: list[Request] = []
    for folder in sorted(CONFIGS.iterdir()):
        config = json.loads((folder / "config.json").read_text())
        try:
            shape = ModelShape.from_config(config)
        except Invalid:
            continue
        number = len(found)
        context = min(8192, shape.max_context_tokens) if number % 4 == 0 else None
        found.append(
            Request(
                name=folder.name,
                shape=shape,
                wishes=Wishes(context=context, concurrency=16 if number % 8 == 0 else None),
                objective=OBJECTIVES[number % len(OBJECTIVES)],
                num_replicas=1 + number % 3,
            )
        )
    step = len(found) / NUM_MODELS
    return [found[int(index * step)] for index in range(NUM_MODELS)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    asked, nodes = requests(), nodes_from_words(INVENTORY)
    num_gpus = sum(len(node.gpus) for node in nodes)
    planning_s, explaining_s = [], []
    for _ in range(rounds):
        began_s = time.process_time()
        decision = choose(asked, nodes)
        planned_s = time.process_time()
        _explain(decision)
        planning_s.append(planned_s - began_s)
        explaining_s.append(time.process_time() - planned_s)
    replicas = len(decision.placed) + len(decision.unplaced)
    cards = {(slot.node, slot.gpu) for placed in decision.placed for slot in placed.slots}
    print(
        f"{len(asked)} models, {replicas} replicas, on {num_gpus} GPUs ({INVENTORY}): "
        f"{len(decision.placed)} placed on {len(cards)} GPUs"
    )
    for name, seconds in (("plan", planning_s), ("explain", explaining_s)):
        median_s = statistics.median(seconds)
        print(
            f"{name:8} {median_s:.2f} s of CPU (median of {rounds}; "
            f"{min(seconds):.2f} to {max(seconds):.2f})"
        )
    return 0 if statistics.median(planning_s) < LIMIT_S else 1


def _explain(decision: Decision) -> None:
    for placed in decision.placed:
        if placed.replica == 0:
            explain(placed, decision.menus[placed.request.name], decision.kinds)


if __name__ == "__main__":
    raise SystemExit(main())
