"""What the guards are put before in tests: an application that says back what it hears."""

import json
from collections.abc import AsyncIterator

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(await request.body())


async def python_json(request: Request) -> JSONResponse:
    """As an application that reads its body with Python's json."""
    return JSONResponse(json.loads(await request.body()))


async def page(request: Request) -> PlainTextResponse:
    return PlainTextResponse("page")


APP = Starlette(
    routes=[
        Route("/v1/completions", echo, methods=["POST"]),
        Route("/v1/python", python_json, methods=["POST"]),
        Route("/v1/models", page),
        Route("/health", page),
        Route("/status", page),
    ]
)


async def chunks_of(size: int, number: int) -> AsyncIterator[bytes]:
    for _ in range(number):
        yield b"x" * size


def check_error(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


async def split(body: bytes) -> AsyncIterator[bytes]:
    for at in range(len(body)):
        yield body[at : at + 1]
