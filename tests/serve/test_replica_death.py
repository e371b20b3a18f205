"""The replica itself is killed under load: with a relay no stream ends, without one no request
of which nothing was sent."""

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from load import stream_all
from server import Server, beside_python, dev_config, free_port, running

pytestmark = [pytest.mark.serve, pytest.mark.timeout(300)]

TOKENS = 1500


def fake_model(name: str, **recovery: Any) -> dict[str, Any]:
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": "deployments.app:build",
        "args": {
            "name": name,
            "model": ".models/demo",
            "engine": "fake",
            "device": {"kind": "cpu", "memory_gib": 1},
            "max_model_len": 2048,
            "replica_cpus": 0.2,
            "engine_cpus": 0.1,
            "recovery": recovery,
        },
    }


@pytest.fixture(scope="module")
def mortal() -> Iterator[Server]:
    """Two models of the fake engine: one behind a relay, one not."""
    document = dev_config(free_port())
    document["applications"] = [
        document["applications"][0],
        fake_model("relayed", survive_replica=True),
        fake_model("bare"),
    ]
    command = [beside_python("ballast"), "serve"]
    with running(command, document, ("relayed", "bare")) as started:
        yield started


def replica_process(server: Server, model: str) -> psutil.Process:
    mark = psutil.Process(server.process.pid).environ()["RAY_TMPDIR"]
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or ())
        if f"ServeReplica:{model}:Model" in title and process.environ()["RAY_TMPDIR"] == mark:
            return process
    raise AssertionError(f"no replica of {model}")


def kill_replica(server: Server, model: str) -> None:
    os.kill(replica_process(server, model).pid, signal.SIGKILL)


async def test_streams_go_on_when_their_replica_is_killed(mortal: Server) -> None:
    run = {"requests": 16, "at_once": 16, "max_tokens": TOKENS}
    expected = await stream_all(mortal.url, "relayed", **run)
    assert [answer.error for answer in expected] == [None] * 16
    before = replica_process(mortal, "relayed").pid
    answers = await stream_all(
        mortal.url, "relayed", after_s=1.0, disturb=lambda: kill_replica(mortal, "relayed"), **run
    )
    assert [answer.error for answer in answers] == [None] * 16
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    assert replica_process(mortal, "relayed").pid != before
    assert max(answer.longest_pause_s for answer in answers) > 1.0, "the kill met no stream"


async def test_requests_of_which_nothing_was_sent_are_asked_again(mortal: Server) -> None:
    """Not streamed, so that nothing is sent before the end."""
    body = {"model": "bare", "prompt": "once", "max_tokens": TOKENS}
    async with httpx.AsyncClient(timeout=120) as client:
        url = f"{mortal.url}/v1/completions"
        expected = (await client.post(url, json=body)).json()["choices"][0]["text"]
        asking = [asyncio.create_task(client.post(url, json=body)) for _ in range(8)]
        await in_flight(mortal, "bare", 8)
        kill_replica(mortal, "bare")
        answers = await asyncio.gather(*asking)
    assert [answer.status_code for answer in answers] == [200] * 8
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {expected}


async def in_flight(server: Server, model: str, number: int) -> None:
    async with asyncio.timeout(30):
        while server.status(model)["requests"]["in_flight"] < number:
            await asyncio.sleep(0.05)
