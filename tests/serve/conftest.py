"""One server for all tests of this folder: both demo engines take most of a minute to start."""

from collections.abc import Iterator

import pytest
from server import POISON, Server, beside_python, dev_config, free_port, running

# The deaths of all tests together are more than a crash loop would be.
_MANY = {"recovery": {"max_restarts": 100}}
# A model that speaks noise would fill a JSON answer with white space, where the grammar allows it.
_TERSE = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
_ALLERGIC = {"fault_injection": True, "faults": [{"prompt_contains": POISON}]}


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """`ballast serve` on dev.yaml: HAProxy, HTTP ending in the replica, two models."""
    document = dev_config(
        free_port(),
        demo={**_MANY, **_ALLERGIC, "engine_args": _TERSE},
        demo_hf={**_MANY, **_ALLERGIC},
    )
    command = [beside_python("ballast"), "serve"]
    with running(command, document, ("demo", "demo-hf")) as started:
        yield started


@pytest.fixture(params=["demo", "demo-hf"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)
