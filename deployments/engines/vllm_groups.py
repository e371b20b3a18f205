"""One listener for all of an engine's groups of one process, where the model shares its cores.

torch opens a listener for each Gloo group, and its thread wakes a hundred times a second. vLLM
makes thirteen groups for an engine of one worker, where nobody has anybody to talk to: 2.5 % of a
core.
"""

from datetime import timedelta
from typing import Any


def install() -> None:
    """Let the groups of one that this process makes from now on share a listener."""
    from torch.distributed import distributed_c10d

    plain: Any = distributed_c10d.ProcessGroupGloo
    shared: list[Any] = []

    class Group(plain):  # type: ignore[misc]
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            if size > 1:
                return super().__init__(store, rank, size, timeout=timeout)
            if not shared:
                shared.append(plain.create_default_device())
            options = plain._Options()
            options._timeout = timeout
            options._devices = shared
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = Group
