import pytest

from placement.inventory import nodes_from_ray
from vram.errors import Invalid
from vram.units import GIB


def _ray_node(node_id: str, **resources: float) -> dict[str, object]:
    labels = {
        name.replace("accelerator_type_", "accelerator_type:"): n for name, n in resources.items()
    }
    return {"NodeID": node_id, "NodeName": f"name-{node_id}", "Alive": True, "Resources": labels}


def test_a_labelled_node_becomes_its_cards() -> None:
    nodes = nodes_from_ray(
        [_ray_node("b", CPU=64, GPU=8, accelerator_type_H200=1.0, memory=512 * GIB)],
        {"b": {"CPU": 60.0, "GPU": 5.5, "memory": 400.0 * GIB}},
    )
    assert [node.name for node in nodes] == ["name-b"]
    assert {gpu.name for gpu in nodes[0].gpus} == {"H200"}
    assert nodes[0].free == (1.0,) * 5 + (0.5, 0.0, 0.0)
    assert (nodes[0].cpus, nodes[0].memory_bytes) == (60.0, 400 * GIB)


def test_a_node_without_a_gpu_still_has_ram_for_models_on_the_cpu() -> None:
    (node,) = nodes_from_ray([_ray_node("a", CPU=2)], {"a": {"CPU": 2.0, "memory": 8.0 * GIB}})
    assert node.gpus == node.free == ()
    assert node.memory_bytes == 8 * GIB


def test_the_dead_are_left_out_and_the_order_is_by_name() -> None:
    dead = _ray_node("c", CPU=2) | {"Alive": False}
    nodes = nodes_from_ray([_ray_node("b", CPU=2), dead, _ray_node("a", CPU=2)], {})
    assert [node.name for node in nodes] == ["name-a", "name-b"]
    assert nodes[0].cpus == 0.0  # nothing is known to be free


def test_nodes_of_one_address_are_told_apart_by_their_id() -> None:
    twins = [_ray_node(node_id, CPU=2) | {"NodeName": "10.0.0.1"} for node_id in ("x", "y")]
    assert [node.name for node in nodes_from_ray(twins, {})] == ["x", "y"]


def test_a_card_that_ray_does_not_label_is_an_error_and_not_a_guess() -> None:
    with pytest.raises(Invalid, match="Unknown GPU"):
        nodes_from_ray([_ray_node("a", CPU=2, GPU=1)], {})
