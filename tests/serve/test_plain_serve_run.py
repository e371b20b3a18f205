"""`serve run serve_configs/dev.yaml` as Ray has it: no HAProxy, no `ballast` command."""

import json

import httpx
import openai
import pytest
from load import stream_all
from server import Server, beside_python, dev_config, free_port, running

pytestmark = [pytest.mark.serve, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def plain() -> Server:
    document = dev_config(free_port())
    with running([beside_python("serve"), "run"], document, ("demo", "demo-hf")) as started:
        yield started


async def test_both_models_answer_at_one_address_by_the_gateway(plain: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{plain.url}/v1", api_key="x") as client:
        assert {model.id async for model in client.models.list()} == {"demo", "demo-hf"}
    for model in ("demo", "demo-hf"):
        answers = await stream_all(plain.url, model, requests=8, at_once=4, max_tokens=16)
        assert [answer.error for answer in answers] == [None] * 8


def test_the_status_and_metrics_of_all_models_are_at_the_root(plain: Server) -> None:
    models = httpx.get(f"{plain.url}/status", timeout=30).json()["models"]
    for name, engine in (("demo", "vllm"), ("demo-hf", "transformers")):
        (report,) = models[name]
        assert (report["engine"], report["state"], report["attempt"]) == (engine, "ready", 1)
        assert report["estimate"]["items"]["weights"] > 0
        assert report["measured"]["resident_bytes"] > 0
        assert report["plan"]["settings"] == report["settings"]
    metrics = httpx.get(f"{plain.url}/metrics", timeout=30).text
    assert 'ballast_engine_state{model="demo",' in metrics
    assert 'state="ready"} 1.0' in metrics


def test_ray_s_dashboard_shows_the_replicas_and_their_placement_groups(plain: Server) -> None:
    applications = plain.of_dashboard("/api/serve/applications/")["applications"]
    for name in ("demo", "demo-hf"):
        deployment = applications[name]["deployments"]["Model"]
        assert [replica["state"] for replica in deployment["replicas"]] == ["RUNNING"]
    groups = plain.placement_groups()
    assert [group["state"] for group in groups] == ["CREATED"] * 2
    assert "memory" in json.dumps(groups)
