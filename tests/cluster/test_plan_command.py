"""`ballast plan` as somebody types it, on real models' config.json and without a network."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from cluster.demo_model import build_demo_model
from cluster.languages import Language
from cluster.plan_words import PHRASES
from deployments.errors import Invalid

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "tests/vram/configs"

Written = Callable[..., Path]


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    build_demo_model(folder)
    return folder


@pytest.fixture
def local(demo_model: Path, tmp_path: Path) -> Callable[[str], Path]:
    """One of serve_configs/, its models in local folders."""

    def make(file: str) -> Path:
        document = yaml.safe_load((ROOT / "serve_configs" / file).read_text())
        for application in document["applications"]:
            if "model" in application["args"]:
                name = application["args"]["model"].rpartition("/")[2].lower()
                real = REAL / name.removesuffix("-instruct")
                application["args"]["model"] = str(demo_model if name == "demo" else real)
        path = tmp_path / file
        path.write_text(yaml.safe_dump(document))
        return path

    return make


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """A config of models by their names in the test data."""

    def make(**models: dict[str, Any]) -> Path:
        applications = [
            {
                "name": name,
                "route_prefix": f"/{name}",
                "import_path": "deployments.app:build",
                "args": {"name": name, "device": {"kind": "cuda"}}
                | args
                | {"model": str(REAL / args["model"])},
            }
            for name, args in models.items()
        ]
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"applications": applications}))
        return path

    return make


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and output; an error of ours is raised, as `main` prints it on one line."""
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.mark.parametrize(
    ("file", "words"), [("prod.yaml", "2x8xH100"), ("single_gpu.yaml", "1xH100"), ("dev.yaml", "")]
)
def test_the_example_configs_are_planned(
    local: Callable[[str], Path], file: str, words: str
) -> None:
    code, said = run(local(file), *(["--gpus", words] if words else []))
    assert code == 0
    for part in ("where", "why there", "memory", "settings", "ladder", "floor"):
        assert part in said
    if words:
        assert "next smaller card" in said
        assert "rejected" in said


def test_a_mixed_cluster_says_what_was_rejected_and_what_less_would_cost(written: Written) -> None:
    path = written(
        big={"model": "qwen2.5-72b"},
        fast={"model": "qwen2.5-7b", "objective": "latency", "max_gpus": 4},
        small={"model": "qwen2.5-0.5b", "objective": "cheapest", "context": 4096},
    )
    code, said = run(path, "--gpus", "2xH200, 5xL40S")
    assert code == 0
    assert "big · vllm · 2 x H200" in said
    assert "H200: needs" in said
    assert "on 4 x L40S: tensor_parallel_size 2 → 4" in said
    assert "fast · vllm · 4 x L40S" in said
    assert re.search(r"small · vllm · 0\.\d\d of one L40S", said)


def test_json_has_everything_in_bytes(written: Written) -> None:
    path = written(a={"model": "qwen2.5-7b"}, b={"model": "qwen2.5-72b"})
    code, said = run(path, "--gpus", "1xH200", "--json")
    assert code == 2
    document = json.loads(said)
    assert document["fits"] is False
    (placed,) = document["placed"]
    assert placed["model"] == "a"
    assert placed["slots"] == [{"node": "h200-0", "gpu": 0, "share": 1.0}]
    assert placed["items"]["weights"] > 10 * 2**30
    assert placed["settings"]["max_model_len"] == 32768
    assert placed["next_smaller_card"]["card"] == "RTXPRO6000"
    (unplaced,) = document["unplaced"]
    assert unplaced["setting"] == "tensor_parallel_size"
    assert unplaced["needed_bytes"] > unplaced["available_bytes"]


def test_a_plan_is_the_same_twice(written: Written) -> None:
    path = written(a={"model": "qwen2.5-7b", "num_replicas": 3}, b={"model": "llama-3.1-8b"})
    assert run(path, "--gpus", "4x2xL40S") == run(path, "--gpus", "4x2xL40S")


def test_chinese_is_chinese(written: Written) -> None:
    path = written(a={"model": "qwen2.5-7b"}, b={"model": "qwen2.5-72b"})
    code, said = run(path, "--gpus", "1xH200", "--lang", "zh")
    assert code == 2
    for part in ("位置", "选择理由", "显存", "降级阶梯", "无法放置", "每张 GPU 需要"):
        assert part in said
    with pytest.raises(Invalid, match="--lang"):
        run(path, "--gpus", "1xH200", "--lang", "fr")


def test_every_phrase_has_the_same_values_in_both_languages() -> None:
    for key, phrase in PHRASES.items():
        if key in ("no_room", "does_not_fit"):
            continue  # a refusal is a sentence of its own in English
        values = [
            {part.partition("}")[0] for part in getattr(phrase, language.value).split("{")[1:]}
            for language in Language
        ]
        assert values[0] == values[1], key


@pytest.mark.parametrize(
    ("args", "words", "said"),
    [
        ({}, "0xH200", "1 to"),
        ({}, "8xVoodoo", "Unknown GPU"),
        ({"context": 40000}, "1xH200", "needs rope_scaling"),
        ({"max_model_len": 40000}, "1xH200", None),
        ({"objective": "best"}, "1xH200", "args.objective"),
        ({"device": {"kind": "cuda", "name": "H1000"}}, "1xH200", "Unknown GPU 'H1000'"),
    ],
)
def test_bad_input_is_one_line(
    written: Written,
    args: dict[str, Any],
    words: str,
    said: str | None,
) -> None:
    path = written(a={"model": "qwen2.5-7b"} | args)
    if said is None:  # the whole of it is an answer: this model has no place
        code, answer = run(path, "--gpus", words)
        assert code == 2
        assert "rope_scaling" in answer
        return
    with pytest.raises(Invalid, match=said) as refused:
        run(path, "--gpus", words)
    assert "\n" not in str(refused.value)


def test_without_an_inventory_the_live_cluster_is_asked_and_missed(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_cluster(**options: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("placement.inventory.connected", lambda: False)
    monkeypatch.setattr("placement.inventory.ray.init", no_cluster)
    with pytest.raises(Invalid, match=r"no Ray cluster runs here: name the cards with --gpus"):
        run(written(a={"model": "qwen2.5-7b"}))


def test_two_inventories_are_one_too_many(written: Written, tmp_path: Path) -> None:
    path = written(a={"model": "qwen2.5-7b"})
    with pytest.raises(Invalid, match="leave one out"):
        run(path, "--gpus", "1xH200", "--inventory", tmp_path / "x")
    with pytest.raises(Invalid, match="no such file"):
        run(path, "--inventory", tmp_path / "x")


def test_an_inventory_file_is_an_inventory(written: Written, tmp_path: Path) -> None:
    inventory = tmp_path / "inventory.json"
    inventory.write_text(json.dumps({"nodes": [{"gpus": [{"card": "L4", "count": 4}]}]}))
    code, said = run(written(a={"model": "qwen2.5-7b"}), "--inventory", inventory)
    assert code == 0
    assert "l4-0, card" in said


def test_neither_ray_nor_torch_is_imported_for_a_plan_on_a_laptop(
    local: Callable[[str], Path],
) -> None:
    program = (
        "import sys\n"
        "from cluster.cli import app\n"
        "try:\n    app(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "print(*{'ray', 'torch', 'transformers', 'vllm', 'pynvml'} & set(sys.modules), "
        "file=sys.stderr)\n"
    )
    arguments = ["plan", str(local("prod.yaml")), "--gpus", "2x8xH100", "--json"]
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.split() == []


def test_the_answer_in_the_documents_is_that_of_the_command(tmp_path: Path) -> None:
    """But for the sizes, which move with every better estimate."""
    page = (ROOT / "docs/planning.md").read_text().partition("## An answer")[2]
    words = re.search(r'--gpus "([^"]+)"', page)
    assert words is not None
    config = tmp_path / "two.yaml"
    config.write_text(
        page.split("```yaml\n")[1]
        .split("```")[0]
        .replace("model: tests/", f"model: {(ROOT / 'tests').as_posix()}/")
    )
    code, said = run(config, "--gpus", words[1])
    assert code == 0
    assert _titles(said) == _titles(page.split("```text\n")[1].split("```")[0])


def _titles(text: str) -> list[str]:
    """Which model got which cards; shares without their hundredths."""
    return [re.sub(r"0\.\d\d", "a share", line) for line in text.splitlines() if " · " in line]
