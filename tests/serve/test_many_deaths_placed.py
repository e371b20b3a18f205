"""Fifty deaths under a real Ray Serve: the same placement group before and after."""

from collections.abc import Iterator

import httpx
import pytest
from server import Server, beside_python, dev_config, free_port, running
from test_replica_death import fake_model

pytestmark = [pytest.mark.serve, pytest.mark.timeout(300)]

DEATHS = 50
LIFE_TOKENS = 5
REQUEST_TOKENS = 4  # fewer: no request is in the batch of two deaths


@pytest.fixture(scope="module")
def dying() -> Iterator[Server]:
    document = dev_config(free_port())
    model = fake_model("dying", max_restarts=2 * DEATHS)
    fault = {"after_tokens": LIFE_TOKENS, "cause": "killed"}
    model["args"] |= {"fault_injection": True, "faults": [fault]}
    document["applications"] = [document["applications"][0], model]
    with running([beside_python("ballast"), "serve"], document, ("dying",)) as started:
        yield started


def placement_group_ids(server: Server) -> set[str]:
    return {group["placement_group_id"] for group in server.placement_groups()}


def test_fifty_deaths_leave_no_placement_group_behind(dying: Server) -> None:
    body = {"model": "dying", "prompt": "once", "max_tokens": REQUEST_TOKENS}
    before = placement_group_ids(dying)
    assert len(before) == 1
    with httpx.Client(timeout=60) as client:
        while dying.status("dying")["attempt"] <= DEATHS:
            answer = client.post(f"{dying.url}/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == REQUEST_TOKENS
    assert dying.status("dying")["state"] == "ready"
    assert placement_group_ids(dying) == before
