import pytest

from placement.words import nodes_from_words
from vram.errors import Invalid


@pytest.mark.parametrize(
    ("words", "cards"),
    [
        ("2x8xH200, 1x4xL40S", [("H200", 8), ("H200", 8), ("L40S", 4)]),
        ("4xL40S", [("L40S", 4)]),
        ("H100", [("H100-80GB", 1)]),
        ("2 x 2 x RTX 4090", [("RTX4090", 2)] * 2),
        ("2×1×A100-80G", [("A100-80GB", 1)] * 2),
        ("4090", [("RTX4090", 1)]),
        ("3x4090", [("RTX4090", 3)]),
    ],
)
def test_words_become_nodes(words: str, cards: list[tuple[str, int]]) -> None:
    nodes = nodes_from_words(words)
    assert [(node.gpus[0].name, len(node.gpus)) for node in nodes] == cards
    assert all(node.free == (1.0,) * len(node.gpus) for node in nodes)
    assert len({node.name for node in nodes}) == len(nodes)


@pytest.mark.parametrize(
    "words",
    ["", ",", "8x", "0xH200", "2x0xH200", "1x2x3xH200", "999999999x9xH200", "8xVoodoo", "x" * 999],
)
def test_what_is_not_an_inventory_is_one_clear_error(words: str) -> None:
    with pytest.raises(Invalid) as caught:
        nodes_from_words(words)
    assert caught.value.setting == "gpus"
    assert len(str(caught.value)) < 1500
