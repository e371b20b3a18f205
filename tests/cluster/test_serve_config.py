"""What a serve config may not say; the files in serve_configs/ are in tests/test_configs.py."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import cli
from cluster.serve_config import ServeConfig, read_serve_config
from deployments.config import RESERVED_NAMES
from deployments.errors import Invalid

Document = dict[str, Any]
Change = Callable[[Document], None]
DOCUMENT: Document = {
    "http_options": {"host": "127.0.0.1", "port": 8000},
    "applications": [
        {"name": "gateway", "route_prefix": "/", "import_path": "deployments.gateway:build"},
        {
            "name": "demo",
            "route_prefix": "/demo",
            "import_path": "deployments.app:build",
            "args": {
                "name": "demo",
                "model": "-",
                "engine": "fake",
                "device": {"kind": "cpu", "memory_gib": 1},
            },
        },
    ],
}


def read(folder: Path, *changes: Change) -> ServeConfig:
    document = copy.deepcopy(DOCUMENT)
    for change in changes:
        change(document)
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(document))
    return read_serve_config(file)


def http(**changes: Any) -> Change:
    return lambda document: document["http_options"].update(changes)


def application(number: int, **changes: Any) -> Change:
    return lambda document: document["applications"][number].update(changes)


def args(**changes: Any) -> Change:
    return lambda document: document["applications"][1]["args"].update(changes)


def named(name: str) -> Change:
    def change(document: Document) -> None:
        document["applications"][1].update(name=name, route_prefix=f"/{name}")
        document["applications"][1]["args"]["name"] = name

    return change


def applications(*numbers: int) -> Change:
    def change(document: Document) -> None:
        document["applications"] = [
            copy.deepcopy(document["applications"][number]) for number in numbers
        ]

    return change


CARD = {"kind": "cuda", "name": "H200"}
# What the error message has to contain, and a change of the document that brings it.
WRONG: dict[str, tuple[Change, str]] = {
    "port abc": (http(port="abc"), "http_options.port: Input should be a valid integer"),
    "port null": (http(port=None), "http_options.port: Input should be a valid integer"),
    "port 0": (http(port=0), "http_options.port is 0; a port is 1 to 65535"),
    "port 65536": (http(port=65536), "http_options.port is 65536; a port is 1 to 65535"),
    "port true": (http(port=True), "http_options.port is True; a port is 1 to 65535"),
    "typo in http_options": (http(prot=80), "unknown key http_options.prot; known are host, "),
    "http_options a list": (lambda d: d.update(http_options=["a"]), "http_options is a mapping"),
    "wrong type in http_options": (
        http(request_timeout_s="soon"),
        "http_options.request_timeout_s: Input should be a valid number",
    ),
    "no host": (lambda d: d["http_options"].pop("host"), "http_options.host is missing"),
    "no http_options": (lambda d: d.pop("http_options"), "write host: 127.0.0.1, or 0.0.0.0"),
    "no applications": (lambda d: d.pop("applications"), "no application serves a model"),
    "empty applications": (applications(), "no application serves a model"),
    "no model": (applications(0), "import_path: deployments.app:build"),
    "two gateways": (
        lambda d: d["applications"].append({**d["applications"][0], "name": "other"}),
        "two applications are the gateway",
    ),
    "named like the gateway": (named("gateway"), "two applications have the name 'gateway'"),
    "import path a list": (application(1, import_path=["a"]), "import_path is ['a']"),
    "deployments a word": (application(1, deployments="x"), "applications.1.deployments is a list"),
    "deployments of words": (
        application(1, deployments=["x"]),
        "applications.1.deployments.0 is a mapping",
    ),
    "typo in deployments": (
        application(1, deployments=[{"name": "Model", "num_replica": 2}]),
        "unknown key applications.1.deployments.0.num_replica; known are ",
    ),
    "deployment without a name": (
        application(1, deployments=[{"num_replicas": 2}]),
        "applications.1.deployments.0.name is missing",
    ),
    "what only Ray knows": (
        lambda d: d.update(proxy_location="Moon"),
        "proxy_location: Input should be 'Disabled', 'HeadOnly' or 'EveryNode'",
    ),
    "infinite RAM": (
        args(device={"kind": "cpu", "memory_gib": float("inf")}),
        "args.device.memory_gib: Input should be a finite number",
    ),
    "RAM that is no number": (
        args(device={"kind": "cpu", "memory_gib": float("nan")}),
        "args.device.memory_gib: Input should be ",
    ),
    "infinite time": (
        args(recovery={"wait_s": float("inf")}),
        "args.recovery.wait_s: Input should be a finite number",
    ),
    "card on a CPU": (
        args(device={"kind": "cpu", "memory_gib": 1, "name": "H200"}),
        "device.name has no effect on a CPU",
    ),
    "RAM of a card": (
        args(device={**CARD, "memory_gib": 1}),
        "device.memory_gib has no effect on a card",
    ),
    "fake on two cards": (
        args(device=CARD, tensor_parallel_size=2),
        "tensor_parallel_size is 2, and the engine fake runs on one card",
    ),
    "transformers in two stages": (
        args(device=CARD, engine="transformers", pipeline_parallel_size=2),
        "pipeline_parallel_size is 2, and the engine transformers runs on one card",
    ),
    "option of fake": (
        args(engine_args={"speed": 2}),
        "args: engine_args.speed can't be given to engine 'fake': it takes none",
    ),
    "option of transformers": (
        args(engine="transformers", engine_args={"attn": "eager"}),
        "to engine 'transformers': it takes attn_implementation, revision",
    ),
    "planned option": (
        args(engine="vllm", engine_args={"max_model_len": 8}),
        "engine_args.max_model_len can't be given to engine 'vllm': the plan owns it",
    ),
} | {
    f"named {name}": (named(name), "applications.1.args.name: ") for name in sorted(RESERVED_NAMES)
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_it_is_refused_with_one_sentence(tmp_path: Path, change: Change, words: str) -> None:
    with pytest.raises(Invalid) as refused:
        read(tmp_path, change)
    sentence = str(refused.value)
    assert sentence.startswith(f"{tmp_path}/serve.yaml: ")
    assert "\n" not in sentence
    assert words in sentence


def test_the_unchanged_document_is_taken(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert [model.name for model in config.models] == ["demo"]
    assert config.gateway is not None
    assert config.num_replicas == 2


def test_one_degree_and_known_options_are_taken(tmp_path: Path) -> None:
    options = {"attn_implementation": "eager"}
    (model,) = read(
        tmp_path, args(engine="transformers", engine_args=options, tensor_parallel_size=1)
    ).models
    assert model.engine_args == options


def test_options_of_vllm_are_left_to_vllm(tmp_path: Path) -> None:
    read(tmp_path, args(engine="vllm", engine_args={"seed": 1}, tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.5", False),
        ("models.example", False),
    ],
)
def test_only_loopback_is_local(tmp_path: Path, host: str, is_local: bool) -> None:
    assert read(tmp_path, http(host=host)).is_local is is_local


def test_keys_may_come_from_a_file_or_from_either_environment(tmp_path: Path) -> None:
    bare = read(tmp_path)
    assert bare.without_keys({}) == ("the gateway", "demo")
    assert bare.without_keys({"BALLAST_API_KEYS": "# none yet"}) == ("the gateway", "demo")
    assert bare.without_keys({"BALLAST_API_KEYS": "secret"}) == ()
    of_the_model = read(tmp_path, args(env={"BALLAST_API_KEYS": "secret"}))
    assert of_the_model.without_keys({}) == ("the gateway",)
    file = read(tmp_path, args(api_keys_file="keys"), application(0, args={"api_keys_file": "k"}))
    assert file.without_keys({}) == ()


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r": it can't be read: Is a directory$"):
        read_serve_config(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "http_options: {host: 127.0.0.1, port: abc}\napplications: []",
        "a: 2026-13-45",  # YAML's own check of dates is a plain ValueError
        "a: " + "[" * 5000,
        "keys: [/etc/keys, *unknown]",  # the message quotes it, and [/…] is markup to rich
    ],
    ids=["port", "date", "depth", "markup"],
)
def test_the_command_says_a_sentence_and_ends_with_2(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(content)
    monkeypatch.setattr("sys.argv", ["ballast", "check", str(file)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"{file}: " in said
    assert len(said.splitlines()) == 1
