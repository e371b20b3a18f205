import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.inventory_file import read_inventory_file
from vram.errors import Invalid
from vram.gpu import device_named
from vram.units import GIB

GOOD: dict[str, Any] = {
    "nodes": [
        {"name": "a", "gpus": [{"card": "H200", "count": 8}], "cpus": 96, "memory_gib": 1024},
        {
            "count": 2,
            "nvlink": False,
            "gpus": [
                {"card": "L40S", "count": 2, "free": 0.5},
                {"card": "Voodoo", "memory_gib": 11.5},
            ],
        },
    ]
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "inventory"


@pytest.mark.parametrize("dump", [yaml.safe_dump, json.dumps], ids=["yaml", "json"])
def test_an_inventory_is_read_from_yaml_and_json(file: Path, dump: Any) -> None:
    file.write_text(dump(GOOD))
    first, second, third = read_inventory_file(file)
    assert (first.name, first.cpus, first.memory_bytes) == ("a", 96, 1024 * GIB)
    assert first.gpus == (device_named("H200"),) * 8
    assert first.free == (1.0,) * 8
    assert (second.name, third.name) == ("l40s-1", "l40s-2")
    assert [gpu.name for gpu in second.gpus] == ["L40S", "L40S", "Voodoo"]
    assert second.free == (0.5, 0.5, 1.0)
    assert second.gpus[2].total_bytes == int(11.5 * GIB)
    assert second.cpus == math.inf, "what is not known never stands in the way"
    assert (first.nvlink, second.nvlink) == (None, False)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([], "a mapping with `nodes:`"),
        ({}, "nodes is missing"),
        ({"nodes": []}, "nodes: List should have at least 1 item"),
        ({"nodes": "8xH200"}, "nodes: Input should be a valid list"),
        ({"nodes": [{"name": "a"}]}, "it has no GPU"),
        ({"nodes": [{"gpus": [{"card": "H200", "count": 0}]}]}, "nodes.0.gpus.0.count"),
        ({"nodes": [{"gpus": [{"card": "H200", "count": "8"}]}]}, "nodes.0.gpus.0.count"),
        ({"nodes": [{"gpus": [{"card": "Voodoo"}]}]}, "Unknown GPU 'Voodoo'; known are"),
        ({"nodes": [{"gpus": [{"card": "H200", "memory_gib": -1}]}]}, "memory_gib"),
        ({"nodes": [{"gpus": [{"card": "H200", "free": 2}]}]}, "nodes.0.gpus.0.free"),
        ({"nodes": [{"gpu": 8}]}, "unknown key nodes.0.gpu"),
        ({"nodes": [{"gpus": [{"card": "H200"}], "cpus": float("nan")}]}, "nodes.0.cpus"),
        ({"nodes": [{"count": 99999, "gpus": [{"card": "H200", "count": 9}]}]}, "at most 100000"),
        ({"nodes": [{"name": "a", "gpus": [{"card": "H200"}]}] * 2}, "the same name"),
    ],
)
def test_what_is_no_inventory_is_one_sentence_with_its_place(
    file: Path, document: Any, said: str
) -> None:
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(Invalid) as refused:
        read_inventory_file(file)
    assert str(refused.value).startswith(f"{file}: ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"", b"a: " + b"[" * 100_000])
def test_what_is_no_text_is_one_sentence(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(Invalid) as refused:
        read_inventory_file(file)
    assert len(str(refused.value)) < 500


def test_a_missing_file_and_a_huge_one_are_not_read(file: Path) -> None:
    with pytest.raises(Invalid, match="no such file"):
        read_inventory_file(file)
    file.write_bytes(b" " * (5 << 20))
    with pytest.raises(Invalid, match="above 4 MiB"):
        read_inventory_file(file)
