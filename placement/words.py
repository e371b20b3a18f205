"""An inventory from words, "2x8xH200, 1x4xL40S": two nodes of eight, one of four."""

import math
import re

from placement.nodes import UNKNOWN_RAM_BYTES, Node
from vram.errors import Invalid
from vram.gpu import device_named

MOST_GPUS = 100_000
TIMES = r"\s*[x×*]\s*"
GROUP = re.compile(
    rf"(?:(?P<nodes>\d{{1,9}}){TIMES}(?=\d+{TIMES}))?"  # nodes only before a number of GPUs
    rf"(?:(?P<gpus>\d{{1,9}}){TIMES})?"
    r"(?P<card>\S.*)"
)


def nodes_from_words(words: str) -> tuple[Node, ...]:
    """Nodes with every card free; CPUs and RAM are not known, so they never stand in the way."""
    nodes: list[Node] = []
    num_gpus = 0
    for words_of_group in words.split(","):
        group = GROUP.fullmatch(words_of_group.strip())
        if group is None:
            raise Invalid(
                f"{words_of_group.strip()[:60]!r} is not an inventory; "
                'write "2x8xH200, 1x4xL40S" or "1xH100"',
                "gpus",
            )
        num_nodes, gpus_per_node = int(group["nodes"] or 1), int(group["gpus"] or 1)
        num_gpus += num_nodes * gpus_per_node
        if num_nodes * gpus_per_node == 0 or num_gpus > MOST_GPUS:
            raise Invalid(
                f"{words_of_group.strip()!r}: an inventory has 1 to {MOST_GPUS} GPUs", "gpus"
            )
        card = device_named(group["card"])
        nodes += [
            Node(
                name=f"{card.name.lower()}-{len(nodes) + index}",
                gpus=(card,) * gpus_per_node,
                free=(1.0,) * gpus_per_node,
                cpus=math.inf,
                memory_bytes=UNKNOWN_RAM_BYTES,
            )
            for index in range(num_nodes)
        ]
    return tuple(nodes)
