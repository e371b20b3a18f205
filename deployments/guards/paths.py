"""Which call a guard has before it."""

from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """The path below where the application is mounted."""
    path: str = scope["path"]
    root = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def is_model_call(scope: Scope) -> bool:
    return (
        scope["type"] == "http"
        and scope["method"] == "POST"
        and route_path(scope).startswith("/v1/")
    )
