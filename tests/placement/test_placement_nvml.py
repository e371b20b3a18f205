"""The driver's answers become cards. The driver is a fake module with pynvml's names."""

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

from placement.inventory import nodes_from_ray
from placement.nvml import card_name, read_cards
from vram.errors import Invalid
from vram.gpu import CARDS_GIB, device_named
from vram.units import GIB, MIB


class NVMLError(Exception):
    pass


@dataclass
class FakeCard:
    name: str | bytes = "NVIDIA H200"
    total: int = 143771 * MIB
    reserved: int = 143771 * MIB - 150109880320  # torch's total_memory, benchmarks/results
    used: int = 0
    capability: tuple[int, int] = (9, 0)
    links: int = 18
    parts: list["FakeCard"] = field(default_factory=list)


@dataclass
class FakeMemory:
    total: int
    reserved: int
    free: int


def driver(cards: list[FakeCard], *, broken: bool = False) -> ModuleType:
    module: Any = ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.nvmlMemory_v2 = 2
    module.open = 0

    def init() -> None:
        if broken:
            raise NVMLError("Driver Not Loaded")
        module.open += 1

    def shutdown() -> None:
        module.open -= 1

    def memory(card: FakeCard, version: int) -> FakeMemory:
        assert version == module.nvmlMemory_v2, "the first version hides what the driver keeps"
        return FakeMemory(card.total, card.reserved, card.total - card.reserved - card.used)

    def link(card: FakeCard, number: int) -> int:
        if number >= card.links:
            raise NVMLError("Not Supported")
        return 1

    def mig_mode(card: FakeCard) -> list[int]:
        if not card.links:
            raise NVMLError("Not Supported")
        return [1 if card.parts else 0, 0]

    def part(card: FakeCard, number: int) -> FakeCard:
        if number >= len(card.parts):
            raise NVMLError("Not Found")
        return card.parts[number]

    module.nvmlInit = init
    module.nvmlShutdown = shutdown
    module.nvmlDeviceGetCount = lambda: len(cards)
    module.nvmlDeviceGetHandleByIndex = lambda index: cards[index]
    module.nvmlDeviceGetName = lambda card: card.name
    module.nvmlDeviceGetMemoryInfo = memory
    module.nvmlDeviceGetCudaComputeCapability = lambda card: card.capability
    module.nvmlDeviceGetNvLinkState = link
    module.nvmlDeviceGetMigMode = mig_mode
    module.nvmlDeviceGetMaxMigDeviceCount = lambda card: 7
    module.nvmlDeviceGetMigDeviceHandleByIndex = part
    return module


def install(monkeypatch: pytest.MonkeyPatch, *cards: FakeCard, broken: bool = False) -> Any:
    module = driver(list(cards), broken=broken)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_a_card_has_our_name_and_what_programs_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    module = install(monkeypatch, FakeCard(used=20 * GIB))
    (card,) = read_cards()
    assert card.device.name == "H200"
    assert card.device.total_bytes == 150109880320
    assert abs(card.device.total_bytes - CARDS_GIB["H200"] * GIB) < 0.02 * GIB
    assert card.device.bfloat16
    assert card.nvlinks == 18
    assert card.free_share == 0.85
    assert module.open == 0, "the driver is let go of"


def test_an_idle_card_is_a_whole_one_although_the_driver_holds_a_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, FakeCard(used=600 * MIB), FakeCard(used=2 * GIB))
    assert [card.free_share for card in read_cards()] == [1.0, 0.98]


def test_an_old_card_has_no_bfloat16_and_no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCard(name=b"Tesla T4", total=15 * GIB, capability=(7, 5), links=0))
    (card,) = read_cards()
    assert (card.device.name, card.device.bfloat16, card.nvlinks) == ("T4", False, 0)


def test_a_card_that_is_cut_is_its_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    part = FakeCard(name="NVIDIA H100 80GB HBM3 MIG 3g.40gb", total=40 * GIB, reserved=0)
    whole = FakeCard(name="NVIDIA H100 80GB HBM3", total=80 * GIB, parts=[part, part])
    install(monkeypatch, whole)
    cards = read_cards()
    assert [card.device.name for card in cards] == ["H100-80GB MIG 3g.40gb"] * 2
    assert {card.device.total_bytes for card in cards} == {40 * GIB}


def test_without_a_driver_or_a_card_there_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, broken=True)
    with pytest.raises(Invalid, match=r"Driver Not Loaded.*--gpus") as refused:
        read_cards()
    assert refused.value.setting == "gpus"
    module = install(monkeypatch)
    with pytest.raises(Invalid, match="sees no GPU"):
        read_cards()
    assert module.open == 0


@pytest.mark.parametrize(
    ("product", "total_gib", "card"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "H100-80GB"),
        ("NVIDIA H100 PCIe", 79.2, "H100-80GB"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "A100-40GB"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40GB"),
        ("Tesla V100-SXM2-32GB", 31.7, "V100-32GB"),
        ("NVIDIA L40S", 44.4, "L40S"),
        ("NVIDIA A10G", 22.1, "A10G"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX4090"),
        ("NVIDIA RTX A6000", 47.4, "A6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 95.0, "RTXPRO6000"),
        ("NVIDIA B200", 178.4, "B200"),
        ("NVIDIA Something 9000", 10.0, "NVIDIA-Something-9000"),
        ("", 10.0, "unnamed"),
    ],
)
def test_products_have_our_names(product: str, total_gib: float, card: str) -> None:
    assert card_name(product, int(total_gib * GIB)) == card


def test_every_card_of_ours_is_found_by_its_own_name() -> None:
    for name, size in CARDS_GIB.items():
        assert card_name(name, int(size * GIB)) == name


# Ray's table and the drivers' answers together


def ray_node(**resources: float) -> dict[str, Any]:
    return {"NodeID": "a", "NodeName": "name-a", "Alive": True, "Resources": resources}


def test_the_driver_knows_which_card_is_free_and_ray_how_much_is_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, FakeCard(used=70 * GIB), FakeCard(), FakeCard())
    (node,) = nodes_from_ray(
        [ray_node(CPU=8, GPU=3)], {"a": {"CPU": 8.0, "GPU": 2.0}}, {"a": read_cards()}
    )
    assert [gpu.name for gpu in node.gpus] == ["H200"] * 3
    assert node.free == (1.0, 1.0, 0.0)
    assert node.nvlink is True


def test_memory_that_ray_knows_nothing_of_is_not_given_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, FakeCard(used=70 * GIB))
    table, free = [ray_node(CPU=8, GPU=1)], {"a": {"GPU": 1.0}}
    (node,) = nodes_from_ray(table, free, {"a": read_cards()})
    assert node.free == (0.49,)
    (empty,) = nodes_from_ray(table, free, {"a": read_cards()}, as_if_empty=True)
    assert empty.free == (1.0,)


def test_cards_that_differ_by_a_driver_s_whim_are_of_one_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, FakeCard(), FakeCard(total=143700 * MIB))
    (node,) = nodes_from_ray([ray_node(CPU=8, GPU=2)], {"a": {"GPU": 2.0}}, {"a": read_cards()})
    assert len(set(node.gpus)) == 1
    assert node.gpus[0].total_bytes == 150109880320 - 71 * MIB


def test_without_the_driver_s_answer_ray_s_label_has_to_do() -> None:
    table = [ray_node(CPU=8, GPU=2, **{"accelerator_type:L4": 1.0})]
    (node,) = nodes_from_ray(table, {"a": {"GPU": 2.0}}, {})
    assert node.gpus == (device_named("L4"),) * 2
    assert (node.label, node.nvlink) == ("L4", None)
