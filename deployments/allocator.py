"""How torch's CUDA allocator is told to behave: by the environment that its process starts with."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from vram.settings import EngineSettings

# torch 2.9 renamed it; later versions read both, the first one first.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_OPTION = "expandable_segments"


def variables(settings: EngineSettings, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to set; what the user has written there stays."""
    if not settings.expandable_segments:
        return {}
    written = next((environment[name] for name in VARIABLES if environment.get(name)), "")
    kept = [option for option in written.split(",") if option and not option.startswith(_OPTION)]
    conf = ",".join([*kept, f"{_OPTION}:True"])
    return dict.fromkeys(VARIABLES, conf)


@contextmanager
def environment(settings: EngineSettings) -> Iterator[None]:
    """Processes that start inside have an allocator as the settings say."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    os.environ.update(variables(settings, os.environ))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
