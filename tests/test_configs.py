"""Every file in serve_configs/ validates and plans without a GPU; wrong ones say what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.demo_model import build_demo_model
from cluster.launch import check
from cluster.serve_config import ServeConfig, read_serve_config
from deployments.config import ModelConfig
from deployments.errors import Invalid
from deployments.planning import make_plan
from placement.fit import Placement, place
from placement.words import nodes_from_words
from vram.errors import DoesNotFit
from vram.plan import Plan
from vram.units import gib_to_bytes

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT / "tests/vram/configs"
FILES = sorted((ROOT / "serve_configs").glob("*.yaml"))
TWO_NODES = "2x8xH100-80GB"

Document = dict[str, Any]


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    build_demo_model(folder)
    return folder


@pytest.fixture(autouse=True)
def config_json(monkeypatch: pytest.MonkeyPatch, demo_model: Path) -> None:
    """The config.json of the real models, from the repository instead of the Hub."""

    def read(model: str) -> dict[str, Any]:
        name = model.rpartition("/")[2].lower().removesuffix("-instruct")
        folder = demo_model if model == ".models/demo" else REAL / name
        return dict(json.loads((folder / "config.json").read_text()))

    monkeypatch.setattr("deployments.shapes.read_config", read)


def plans_of(config: ServeConfig) -> dict[str, Plan]:
    """A plan for each replica."""
    return {
        f"{model.name}#{replica}": make_plan(model)[0]
        for model in config.models
        for replica in range(model.num_replicas)
    }


def placed(file: str, words: str) -> Placement:
    config = read_serve_config(ROOT / "serve_configs" / file)
    return place(plans_of(config), nodes_from_words(words))


def used(placement: Placement) -> dict[tuple[str, int], float]:
    shares: dict[tuple[str, int], float] = {}
    for assignment in placement.assignments:
        for slot in assignment.slots:
            card = (slot.node, slot.gpu)
            shares[card] = shares.get(card, 0.0) + slot.share
    return shares


def test_the_three_files_are_there() -> None:
    assert {file.name for file in FILES} >= {"dev.yaml", "single_gpu.yaml", "prod.yaml"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_config_validates_and_its_plans_fit(file: Path) -> None:
    config = read_serve_config(file)
    assert config.gateway is not None
    assert config.models
    for model in config.models:
        plan, bundles = make_plan(model)
        assert plan.estimate.fits
        share_bytes = plan.device.total_bytes * plan.gpu_fraction
        assert plan.estimate.device_use_under_load_bytes <= share_bytes
        assert len(bundles.bundles) == 1 + plan.settings.num_gpus


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_ballast_check_says_a_line_for_each_model(file: Path) -> None:
    config = read_serve_config(file)
    lines: list[str] = []
    check(config, lines.append)
    assert [line.split(":")[0] for line in lines] == [model.name for model in config.models]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_only_a_config_for_production_listens_to_the_world(file: Path) -> None:
    config = read_serve_config(file)
    if config.host == "127.0.0.1":
        return
    guarded: list[ModelConfig | Any] = [config.gateway, *config.models]
    assert all(each.api_keys_file is not None for each in guarded)


def test_single_gpu_shares_one_card() -> None:
    placement = placed("single_gpu.yaml", "1xH100-80GB")
    assert placement.unplaced == ()
    assert len(used(placement)) == 1
    assert max(used(placement).values()) <= 1 + 1e-6


def test_prod_is_placed_on_two_nodes_with_every_group_on_one_of_them() -> None:
    placement = placed("prod.yaml", TWO_NODES)
    assert placement.unplaced == ()
    for assignment in placement.assignments:
        assert len({slot.node for slot in assignment.slots}) == 1, assignment
        assert len({slot.gpu for slot in assignment.slots}) == len(assignment.slots)
    assert max(used(placement).values()) <= 1 + 1e-6
    sizes = {a.model.partition("#")[0]: len(a.slots) for a in placement.assignments}
    assert 2 in sizes.values()


def test_prod_does_not_fit_on_cards_that_are_too_small_and_says_why() -> None:
    placement = placed("prod.yaml", "4x8xA100-40GB")
    assert placement.assignments == ()
    assert all("H100-80GB" in rejection.reason for rejection in placement.rejections)


# Wrong files


def set_top(key: str, value: Any) -> Callable[[Document], None]:
    return lambda document: document.__setitem__(key, value)


def set_application(number: int, key: str, value: Any) -> Callable[[Document], None]:
    return lambda document: document["applications"][number].__setitem__(key, value)


def set_args(number: int, **changes: Any) -> Callable[[Document], None]:
    return lambda document: document["applications"][number]["args"].update(changes)


def drop_args(number: int, key: str) -> Callable[[Document], None]:
    return lambda document: document["applications"][number]["args"].pop(key)


def called_a_path(document: Document) -> None:
    application = document["applications"][1]
    application["name"] = application["args"]["name"] = "a/b"
    application["route_prefix"] = "/a/b"


def both_called_demo(document: Document) -> None:
    second = document["applications"][2]
    second["name"] = second["args"]["name"] = "demo"
    second["route_prefix"] = "/demo"


BY_HAND = [{"name": "Model", "placement_group_bundles": [{"CPU": 1}, {"GPU": 1}]}]
WRONG: dict[str, tuple[Callable[[Document], None], tuple[str, ...]]] = {
    "unknown top key": (set_top("aplications", []), ("unknown key aplications", "applications")),
    "applications that are no list": (set_top("applications", {"a": 1}), ("applications is a",)),
    "unknown key of an application": (
        set_application(1, "route_prefx", "/demo"),
        ("unknown key applications.1.route_prefx", "route_prefix"),
    ),
    "application that is no mapping": (
        lambda document: document["applications"].append("demo"),
        ("applications.3 is a mapping",),
    ),
    "other import path": (
        set_application(1, "import_path", "deployments.app:biuld"),
        ("applications.1.import_path", "deployments.app:build"),
    ),
    "unknown key in args": (
        set_args(1, max_modl_len=1),
        ("unknown key applications.1.args.max_modl_len",),
    ),
    "unknown key deep in args": (
        set_args(1, recovery={"wait": 3}),
        ("unknown key applications.1.args.recovery.wait",),
    ),
    "unknown key of the gateway": (set_args(0, keys="x"), ("applications.0.args.keys",)),
    "missing device": (drop_args(1, "device"), ("applications.1.args.device is missing",)),
    "objective without effect": (
        set_args(1, objective="latency"),
        ("applications.1.args", "objective has no effect on a CPU"),
    ),
    "unknown objective": (set_args(1, objective="fast"), ("args.objective", "'throughput'")),
    "cards for a CPU": (set_args(1, max_gpus=2), ("max_gpus has no effect on a CPU",)),
    "context beside its pin": (set_args(1, context=1024), ("context has no effect beside",)),
    "RAM without a size": (set_args(1, device={"kind": "cpu"}), ("args.device", "memory_gib")),
    "share of a CPU": (
        set_args(1, device={"kind": "cpu", "memory_gib": 4, "gpu_fraction": 0.5}),
        ("args.device", "gpu_fraction"),
    ),
    "wrong type": (set_args(1, max_model_len="long"), ("applications.1.args.max_model_len",)),
    "number out of range": (set_args(1, max_num_seqs=0), ("applications.1.args.max_num_seqs",)),
    "name that can't be in a URL": (called_a_path, ("applications.1.args.name",)),
    "unknown engine": (
        set_args(1, engine="vlm"),
        ("applications.1.args", "'vlm'", "vllm, transformers, fake"),
    ),
    "faults without effect": (
        set_args(1, faults=[{"life": 1}]),
        ("applications.1.args", "faults have no effect", "fault_injection: true"),
    ),
    "fault in a phase that the engine lacks": (
        set_args(2, fault_injection=True, faults=[{"phase": "kv_planning"}]),
        ("applications.2.args", "kv_planning", "load_model"),
    ),
    "fault in a capture of graphs that there is not": (
        set_args(1, fault_injection=True, faults=[{"phase": "graph_capture"}]),
        ("applications.1.args", "warm_up"),
    ),
    "fault after tokens before there are any": (
        set_args(1, fault_injection=True, faults=[{"phase": "load_model", "after_tokens": 3}]),
        ("applications.1.args.faults", "after_tokens has no effect"),
    ),
    "fault that kills by an exception": (
        set_args(1, fault_injection=True, faults=[{"cause": "killed", "by": "exception"}]),
        ("applications.1.args.faults", "by: sigkill"),
    ),
    "fault with a cause that has no effect": (
        set_args(1, fault_injection=True, faults=[{"cause": "host_memory", "by": "sigstop"}]),
        ("applications.1.args.faults", "cause has no effect with by: sigstop"),
    ),
    "bundles by hand": (
        set_application(1, "deployments", BY_HAND),
        ("placement_group_bundles", "applications.1.deployments", "the plan owns"),
    ),
    "bundles by hand in args": (
        set_args(1, placement_group_bundles=[{"CPU": 1}]),
        ("unknown key applications.1.args.placement_group_bundles",),
    ),
    "wrong route_prefix": (
        set_application(1, "route_prefix", "/v1"),
        ("applications.1", "route_prefix: /demo", "'/v1'"),
    ),
    "wrong application name": (
        set_application(1, "name", "other"),
        ("applications.1", "name: demo", "'other'"),
    ),
    "gateway elsewhere": (set_application(0, "route_prefix", "/gate"), ("applications.0", "/gate")),
    "one name twice": (both_called_demo, ("two applications have the name 'demo'",)),
}


@pytest.fixture
def dev() -> Document:
    return dict(yaml.safe_load((ROOT / "serve_configs/dev.yaml").read_text()))


@pytest.fixture
def wrong_file(tmp_path: Path) -> Path:
    return tmp_path / "wrong.yaml"


def assert_refused(file: Path, *words: str) -> None:
    """With one sentence that begins with the file."""
    with pytest.raises(Invalid) as refused:
        read_serve_config(file)
    sentence = str(refused.value)
    assert sentence.startswith(f"{file}: ")
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(("spoil", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_config_is_refused_with_one_sentence_that_names_the_place(
    dev: Document, wrong_file: Path, spoil: Callable[[Document], None], words: tuple[str, ...]
) -> None:
    spoil(dev)
    wrong_file.write_text(yaml.safe_dump(dev))
    assert_refused(wrong_file, *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"applications: [\n  {name: demo", "this is not YAML"),
        (b"\xff\xfe\x00applications", "this is not YAML"),
        (b"a: &a [*b]", "this is not YAML"),
        (b"- demo\n- demo-hf\n", "is a mapping"),
        (b"", "is a mapping"),
    ],
)
def test_a_file_that_is_no_config_is_refused(wrong_file: Path, content: bytes, words: str) -> None:
    wrong_file.write_bytes(content)
    assert_refused(wrong_file, words)


def test_a_missing_file_is_refused(wrong_file: Path) -> None:
    assert_refused(wrong_file, "there is no such file")


def test_an_unspoiled_copy_is_taken(dev: Document, wrong_file: Path) -> None:
    wrong_file.write_text(yaml.safe_dump(dev))
    assert [model.name for model in read_serve_config(wrong_file).models] == ["demo", "demo-hf"]


def model_config(**changes: Any) -> ModelConfig:
    values = {
        "name": "big",
        "model": "Qwen/Qwen2.5-72B-Instruct",
        "device": {"kind": "cuda", "name": "H100-80GB"},
    }
    return ModelConfig.model_validate(values | changes)


def test_a_model_that_can_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(DoesNotFit, match=r"^big .* needs .* GiB.* It fits on \d GPUs\.") as refused:
        make_plan(model_config(max_gpus=1))
    assert "\n" not in str(refused.value)
    assert refused.value.available_bytes <= gib_to_bytes(79.19)


def test_the_real_model_of_the_readme_fits_in_the_place_of_the_demo_model() -> None:
    demo, demo_hf = read_serve_config(ROOT / "serve_configs/dev.yaml").models
    real = {"model": "Qwen/Qwen2.5-0.5B-Instruct"}
    assert make_plan(demo.model_copy(update=real))[0].estimate.fits
    with pytest.raises(DoesNotFit, match=r"It fits in .* of RAM"):
        make_plan(demo_hf.model_copy(update=real))


def test_an_unknown_card_is_refused_with_the_known_ones() -> None:
    with pytest.raises(Invalid, match=r"Unknown GPU 'H1000'; known are .*H100-80GB"):
        make_plan(model_config(device={"kind": "cuda", "name": "H1000"}))


def test_a_share_of_several_cards_is_refused() -> None:
    device = {"kind": "cuda", "name": "H100-80GB", "gpu_fraction": 0.5}
    with pytest.raises(Invalid, match="gpu_fraction"):
        make_plan(model_config(device=device, tensor_parallel_size=2))
