"""`ballast status`: what a running server says of its replicas. Changes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict

from deployments.errors import BallastError
from deployments.supervisor import State

TIMEOUT_S = 15.0  # the gateway gives a replica 5 s


class Unreachable(BallastError):
    """No server of ours answers there."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url = url
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.url} can't be asked: {self.reason}"


class _Said(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Degraded(_Said):
    """As `/status` has it."""

    since: float
    price: str
    path: tuple[str, ...] = ()
    failed_climbs: int = 0
    next_climb_at: float | None = None


class Replica(_Said):
    """One replica, or a model whose replicas don't answer."""

    model: str
    state: str
    reason: str = ""
    replica: str = ""
    engine: str = ""
    rung: str = ""
    degraded: Degraded | None = None

    @property
    def is_well(self) -> bool:
        return self.state == State.READY and self.degraded is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Of a whole server, or of one model's replica that was asked by itself."""

    document: Mapping[str, Any]  # as it was said
    replicas: tuple[Replica, ...]

    @property
    def is_well(self) -> bool:
        return all(replica.is_well for replica in self.replicas)


def ask(url: str, api_key: str | None) -> Status:
    """`url` is that of the server or of a model below it. Raises `Unreachable`."""
    address = f"{url.rstrip('/').removesuffix('/status')}/status"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(address, headers=headers, timeout=TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise Unreachable(address, f"{error or type(error).__name__}") from error
    if answer.status_code == 401:
        raise Unreachable(address, "it needs a key: give one with BALLAST_API_KEY")
    if answer.status_code != 200:
        raise Unreachable(address, f"it answers {answer.status_code}")
    try:
        return read(answer.json())
    except (ValueError, RecursionError) as error:
        raise Unreachable(address, "its answer is not the status of a Ballast server") from error


def read(document: Any) -> Status:
    """Raises `ValueError` for what is no status."""
    if not isinstance(document, dict):
        raise ValueError("no object")
    if "models" not in document:
        return Status(document=document, replicas=(Replica.model_validate(document),))
    models = document["models"]
    if not isinstance(models, dict) or not all(isinstance(said, list) for said in models.values()):
        raise ValueError("models is no object of lists")
    replicas = tuple(Replica.model_validate(one) for said in models.values() for one in said)
    return Status(document=document, replicas=replicas)
