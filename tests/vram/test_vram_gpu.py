import pytest

from vram.errors import Invalid
from vram.gpu import CARDS_GIB, cpu_device, device_named
from vram.units import GIB


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("H200", "H200"),
        ("h100", "H100-80GB"),
        ("A100-80G", "A100-80GB"),
        ("NVIDIA L40S", "L40S"),
        ("RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("Tesla T4", "T4"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("H100-SXM5-80GB", "H100-80GB"),
        ("H100 PCIe", "H100-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTXPRO6000"),
    ],
)
def test_a_card_is_known_by_the_names_that_people_and_drivers_use(name: str, card: str) -> None:
    assert device_named(name).name == card


@pytest.mark.parametrize("name", ["H100 NVL", "NVIDIA L40", "NVIDIA H20", "A100-64GB", "PCIe"])
def test_a_card_of_another_size_is_not_taken_for_one_that_we_know(name: str) -> None:
    with pytest.raises(Invalid, match="known are"):
        device_named(name)


def test_totals_are_the_drivers_and_not_the_printed_ones() -> None:
    assert device_named("H200").total_bytes / GIB == pytest.approx(139.80, abs=0.01)
    assert device_named("H100").total_bytes / GIB == pytest.approx(79.19, abs=0.01)


@pytest.mark.parametrize("card", CARDS_GIB)
def test_every_card_answers_to_its_own_name(card: str) -> None:
    assert device_named(card).name == card


def test_an_unknown_card_lists_the_known_ones() -> None:
    with pytest.raises(Invalid, match="H200"):
        device_named("Voodoo 2")


def test_old_cards_have_no_bfloat16() -> None:
    assert not device_named("V100").bfloat16
    assert device_named("L4").bfloat16


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf")])
def test_a_share_of_ram_is_a_positive_number_of_bytes(size: float) -> None:
    with pytest.raises(Invalid):
        cpu_device(size)  # type: ignore[arg-type]
