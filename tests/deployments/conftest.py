"""Fixtures that tests of the deployments share."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from samples import SETTINGS

from vram.ladder import Rung
from vram.settings import EngineSettings


@pytest.fixture
def settings() -> EngineSettings:
    return SETTINGS


@pytest.fixture
def ladder() -> Callable[[int], tuple[Rung, ...]]:
    """Three rungs by context: 2048, 1024, 512, and none below the longest request in flight."""

    def rungs(longest_request_tokens: int) -> tuple[Rung, ...]:
        return tuple(
            Rung(
                name=name,
                settings=replace(SETTINGS, max_model_len=max(tokens, longest_request_tokens)),
                price=f"context {tokens}",
                skipped_reason=None,
            )
            for name, tokens in (("user", 2048), ("half", 1024), ("quarter", 512))
        )

    return rungs
