"""A local Ray cluster as an inventory. Its GPUs are promises: no driver answers for them here."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from deployments.app import build
from deployments.config import ModelConfig
from placement.inventory import connected, read_inventory
from vram.gpu import device_named

REAL = Path(__file__).resolve().parents[1] / "vram/configs"

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        num_cpus=4,
        num_gpus=2,
        resources={"accelerator_type:H200": 1},
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@ray.remote(num_gpus=0.5, num_cpus=0)
class Tenant:
    def ready(self) -> bool:
        return True


def test_the_nodes_and_what_is_free_of_them_come_from_ray() -> None:
    assert connected()
    (node,) = read_inventory()
    assert node.gpus == (device_named("H200"),) * 2
    assert node.free == (1.0, 1.0)
    tenant = Tenant.remote()
    assert ray.get(tenant.ready.remote())
    _until_free(1.5)
    (as_if_empty,) = read_inventory(as_if_empty=True)
    assert as_if_empty.free == (1.0, 1.0)
    ray.kill(tenant)
    _until_free(2.0)


def _until_free(num_gpus: float) -> None:
    """A raylet tells Ray's head of what it gave away a moment later."""
    deadline_s = time.monotonic() + 30.0
    while sum(read_inventory()[0].free) != pytest.approx(num_gpus):
        assert time.monotonic() < deadline_s, read_inventory()
        time.sleep(0.05)


def test_an_application_is_planned_on_the_cluster_that_it_is_built_in() -> None:
    """Alone, `latency` would take eight cards; the cluster has two."""
    config = ModelConfig.model_validate(
        {
            "name": "m",
            "model": str(REAL / "qwen2.5-32b"),
            "device": {"kind": "cuda"},
            "objective": "latency",
        }
    )
    deployment = build(config)._bound_deployment
    _, plan, placed = deployment.init_args
    assert plan.device.name == "H200"
    assert plan.settings.tensor_parallel_size == 2
    assert plan.settings.max_num_batched_tokens == 2048
    assert [bundle.get("GPU", 0) for bundle in placed.bundles] == [0, 1, 1]
