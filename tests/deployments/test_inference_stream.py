import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from test_openai_harness import Ladder, answer_of, client_of, serving, texts_of

from deployments.inference_stream import PATH, InferenceStream

ASKED = {"modelId": "fake", "prompt": "hello"}


@asynccontextmanager
async def client_over_fake(ladder: Ladder) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        serving(ladder) as served,
        client_of(InferenceStream(served.app, model="fake")) as client,
    ):
        yield client


async def test_it_streams_what_completions_streams(ladder: Ladder) -> None:
    async with client_over_fake(ladder) as client:
        response = await client.post(PATH, json={**ASKED, "max_tokens": 20, "temperature": 0})
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        *lines, done, _ = response.text.split("\n\n")
        assert done == "data: [DONE]"
        assert texts_of([json.loads(line[6:]) for line in lines]) == {0: answer_of("hello", 20)}


async def test_the_openai_endpoints_are_still_there(ladder: Ladder) -> None:
    async with client_over_fake(ladder) as client:
        response = await client.post("/v1/completions", json={"prompt": "hello"})
        assert response.json()["choices"][0]["text"] == answer_of("hello", 16)
        assert (await client.get("/v1/models")).status_code == 200


async def test_it_works_below_a_prefix(ladder: Ladder) -> None:
    async with serving(ladder) as served:
        stream = InferenceStream(served.app, model="fake")
        async with client_of(Starlette(routes=[Mount("/fake", stream)])) as client:
            response = await client.post(f"/fake{PATH}", json=ASKED)
            assert "[DONE]" in response.text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"modelId": None}, "modelId"),
        ({"modelId": 5}, "modelId"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["hello"]}, "prompt"),
        ({"prompt": "a" * 3000}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"stop": [1]}, "stop"),
        ({"model": "fake"}, "model"),
        ({"maxTokens": 5}, "maxTokens"),
    ],
)
async def test_a_wrong_field_is_named_as_it_is_called_here(
    ladder: Ladder, change: dict[str, Any], param: str
) -> None:
    async with client_over_fake(ladder) as client:
        response = await client.post(PATH, json={**ASKED, **change})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("missing", ["modelId", "prompt"])
async def test_a_missing_field_is_named(ladder: Ladder, missing: str) -> None:
    async with client_over_fake(ladder) as client:
        asked = {name: value for name, value in ASKED.items() if name != missing}
        response = await client.post(PATH, json=asked)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == missing


async def test_an_unknown_model_is_a_404_that_names_model_id(ladder: Ladder) -> None:
    async with client_over_fake(ladder) as client:
        response = await client.post(PATH, json={**ASKED, "modelId": "other"})
        assert response.status_code == 404
        assert response.json()["error"]["param"] == "modelId"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"modelId": "\xff"}', b"[" * 100_000])
async def test_a_body_that_is_no_json_object_is_a_400(ladder: Ladder, body: bytes) -> None:
    async with client_over_fake(ladder) as client:
        response = await client.post(PATH, content=body)
        assert response.status_code == 400


async def test_other_methods_are_refused(ladder: Ladder) -> None:
    async with client_over_fake(ladder) as client:
        response = await client.get(PATH)
        assert response.status_code == 405
        assert response.headers["allow"] == "POST"


async def test_errors_of_another_application_get_the_names_of_this_endpoint() -> None:
    async def refuse(_: Any) -> JSONResponse:
        error = {"message": "too long", "param": "input_tokens", "code": 400}
        return JSONResponse({"error": error}, 400, {"x-other": "kept"})

    inner = Starlette(routes=[Route("/v1/completions", refuse, methods=["POST"])])
    async with client_of(InferenceStream(inner, model="fake")) as client:
        response = await client.post(PATH, json=ASKED)
        assert response.status_code == 400
        assert response.json()["error"] == {"message": "too long", "param": "prompt", "code": 400}
        assert response.headers["x-other"] == "kept"
        assert int(response.headers["content-length"]) == len(response.content)


async def test_an_error_that_is_no_json_passes_unchanged() -> None:
    async def fail(_: Any) -> JSONResponse:
        return JSONResponse("plain", 502)

    inner = Starlette(routes=[Route("/v1/completions", fail, methods=["POST"])])
    async with client_of(InferenceStream(inner, model="fake")) as client:
        response = await client.post(PATH, json=ASKED)
        assert (response.status_code, response.text) == (502, '"plain"')
