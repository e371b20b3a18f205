"""How torch's CUDA allocator is told to behave: by the environment that its process starts with."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager

from deployments.environment import changed
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


def environment(settings: EngineSettings) -> AbstractContextManager[None]:
    """Processes that start inside have an allocator as the settings say."""
    return changed(variables(settings, os.environ))
