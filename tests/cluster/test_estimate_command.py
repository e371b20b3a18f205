"""`ballast estimate` says what a model needs, whether it fits, and what would."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import CONFIGS, Ran, run_alone, run_here

from cluster.estimate_command import answer, inventory
from cluster.languages import PHRASES
from cluster.pins import KNOWN, read_pins
from deployments.engines.registry import engine_versions
from vram.calibration import Load, append_load, shape_hash
from vram.estimate import estimate
from vram.gpu import device_named
from vram.model import ModelShape
from vram.residuals import load_kind
from vram.settings import EngineSettings
from vram.units import GIB

H200 = ("--gpus", "1xH200")
# What the first item of issue 3's point 4 promises to readers of the JSON.
PROMISED_ITEMS = {
    "weights", "kv_cache", "peak_activation", "cuda_graphs", "non_torch", "communication"
}  # fmt: skip


@pytest.fixture
def ballast(monkeypatch, capsys) -> Callable[..., Ran]:
    def run(model: str, *words: str) -> Ran:
        return run_here(monkeypatch, capsys, "estimate", str(CONFIGS / model), *words)

    return run


def document(ran: Ran) -> dict[str, Any]:
    assert ran.err == ""
    found = json.loads(ran.out)
    assert ran.code == (0 if found["fits"] else 2)
    assert bool(found["reason"]) != found["fits"]
    return found


def shape(name: str) -> ModelShape:
    return ModelShape.from_config(json.loads((CONFIGS / name / "config.json").read_text()))


def test_the_json_has_every_item_in_bytes_and_adds_up(ballast) -> None:
    found = document(ballast("qwen2.5-7b", *H200, "--set", "max_model_len=8192", "--json"))
    assert set(found["items"]) >= PROMISED_ITEMS
    assert sum(found["items"].values()) == found["total"]
    beyond = sum(found["outside"].values())
    assert found["total"] + beyond == found["device_use_under_load"]
    assert found["items"]["weights"] > 14 * GIB
    assert found["kv_cache_tokens"] > 10**6
    assert found["settings"]["max_model_len"] == 8192
    assert found["reason"] == ""


def test_the_json_is_the_estimate_of_the_settings_that_it_names(ballast) -> None:
    words = ("--set", "gpu-memory-utilization=0.5", "--set", "enforce_eager=true", "--json")
    found = document(ballast("llama-3.1-8b", *H200, *words))
    settings = EngineSettings(**found["settings"])
    assert settings.enforce_eager
    expected = estimate(shape("llama-3.1-8b"), settings, device_named("H200"))
    assert found["items"] == {item.name: item.bytes for item in expected.items}
    assert found["kv_cache_tokens"] == expected.kv_cache_tokens


@pytest.mark.parametrize("key", KNOWN)
def test_every_setting_of_an_engine_can_be_pinned(key: str) -> None:
    words = {"dtype": "float16", "quantization": "fp8", "kv_cache_dtype": "fp8"}
    words["max_num_batched_tokens"] = "4096"
    of_kind = {bool: "true", int: "4", float: "0.5"}
    text = words.get(key) or of_kind[KNOWN[key][0]]
    cards, _ = inventory("8xH200")
    found = answer("x", shape("llama-3.1-8b"), cards[0], "vllm", read_pins([f"{key}={text}"]))
    pinned = getattr(found.settings, key)
    assert str(pinned).lower() == text


def test_a_model_that_does_not_fit_says_which_item_is_at_fault_and_what_would_do(ballast) -> None:
    words = ("--set", "gpu_memory_utilization=0.12", "--set", "max_model_len=32768")
    found = document(ballast("qwen2.5-7b", *H200, *words, "--json"))
    turned = [name for remedy in found["remedies"] for name in remedy]
    assert found["at_fault"] in ("kv_cache", "weights")
    assert "gpu_memory_utilization" in turned
    assert re.search(r"at 32768 tokens on an H200 needs .* available", found["reason"])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("llama-3.1-8b", ("--gpus", "1xL4")),
        ("qwen2.5-72b", ("--gpus", "1xH200", "--set", "max_model_len=4096")),
        ("llama-3.1-8b", ("--gpus", "1xH200", "--set", "gpu_memory_utilization=0.13")),
        ("qwen3-30b-a3b", ("--gpus", "1xA100-80GB", "--set", "gpu_memory_utilization=0.75")),
        ("mixtral-8x7b", ("--gpus", "1xH100", "--set", "kv_cache_memory_bytes=1000")),
        (
            "gemma-3-27b",
            (
                "--gpus",
                "1xL40S",
            ),
        ),
    ],
)
def test_every_remedy_works_when_it_is_done(ballast, model: str, words: tuple[str, ...]) -> None:
    found = document(ballast(model, *words, "--json"))
    assert not found["fits"]
    assert found["remedies"]
    for remedy in found["remedies"]:
        pins = dict(word.split("=") for word in words if "=" in word)
        pins |= {name: str(value) for name, value in remedy.items()}
        again = [part for name, value in pins.items() for part in ("--set", f"{name}={value}")]
        gpus = f"8x{found['card']['name']}" if "tensor_parallel_size" in remedy else words[1]
        after = document(ballast(model, "--gpus", gpus, *again, "--json"))
        assert after["fits"], (remedy, after["reason"])


def test_a_model_too_big_for_one_card_is_split_over_the_fewest_that_hold_it(ballast) -> None:
    found = document(
        ballast("llama-3.1-70b", "--gpus", "2x8xH100", "--set", "max_model_len=131072", "--json")
    )
    assert found["fits"]
    assert found["settings"]["tensor_parallel_size"] == found["num_gpus"] == 4


def test_a_split_crosses_nodes_only_when_one_node_is_too_small(ballast) -> None:
    pins = ("--set", "max_model_len=8192", "--json")
    one_node = document(ballast("llama-3.1-405b", "--gpus", "1x8xH100", *pins))
    two_nodes = document(ballast("llama-3.1-405b", "--gpus", "2x8xH100", *pins))
    assert not one_node["fits"]
    assert two_nodes["fits"]
    assert two_nodes["settings"]["tensor_parallel_size"] == 8
    assert two_nodes["settings"]["pipeline_parallel_size"] == 2


def test_more_gpus_than_there_are_is_a_refusal_that_still_shows_the_items(ballast) -> None:
    found = document(ballast("qwen2.5-7b", *H200, "--set", "tensor_parallel_size=2", "--json"))
    assert not found["fits"]
    assert "2 GPUs are asked for and 1 of H200" in found["reason"]
    assert found["items"]["communication"] > 0


def test_the_card_that_holds_it_comes_first_and_the_others_are_named(ballast) -> None:
    found = document(ballast("llama-3.1-8b", "--gpus", "1xL4, 1xH200", "--json"))
    assert found["card"]["name"] == "H200"
    (other,) = found["other_cards"]
    assert (other["name"], other["fits"]) == ("L4", False)
    assert other["reason"]


def test_the_table_shows_items_bars_settings_and_the_verdict(ballast) -> None:
    ran = ballast("llama-3.1-8b", "--gpus", "1xL4, 1xH200", "--set", "max_model_len=131072")
    assert ran.code == 0
    for word in ("weights", "KV cache", "█", "max_model_len=131072", "It fits.", "1 × L4: it does"):
        assert word in ran.out
    assert max(map(len, ran.out.splitlines())) <= 120


def test_a_refusal_in_chinese_has_the_same_numbers_and_no_english_sentence(ballast) -> None:
    words = ("--gpus", "1xL4", "--json")
    english = document(ballast("llama-3.1-8b", *words))
    chinese = document(ballast("llama-3.1-8b", *words, "--lang", "zh"))
    assert "可用 22.0 GiB" in chinese["reason"]
    assert "22.0 GiB are available" in english["reason"]
    assert " the " not in chinese["reason"]
    assert chinese["remedies"] == english["remedies"]


def test_the_table_in_chinese_follows_the_locale(ballast, monkeypatch) -> None:
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    ran = ballast("qwen2.5-7b", *H200)
    assert PHRASES["weights"].zh in ran.out
    assert PHRASES["fits"].zh in ran.out


def test_a_share_of_ram_stands_for_a_card(ballast) -> None:
    found = document(ballast("qwen2.5-0.5b", "--gpus", "cpu:8GiB", "--json"))
    assert found["card"] == {"name": "CPU", "total_bytes": 8 * GIB}
    assert found["items"]["cuda_graphs"] == 0


def test_without_gpus_the_assumed_card_is_named(ballast, monkeypatch) -> None:
    monkeypatch.setattr("cluster.estimate_command._cards_here", list)
    found = document(ballast("qwen2.5-0.5b", "--json"))
    assert found["card"]["name"] == "H100-80GB"
    assert "H100-80GB" in found["notes"][0]


def test_the_cards_of_this_machine_are_taken_where_there_are_some(monkeypatch) -> None:
    monkeypatch.setattr("cluster.estimate_command._cards_here", lambda: [device_named("L4")] * 3)
    (cards,), note = inventory(None)
    assert (cards.device.name, cards.number, note) == ("L4", 3, "")


@pytest.mark.parametrize("words", [(), ("--lang", "zh"), ("--json",)])
def test_a_name_alone_is_an_approximation_that_never_says_that_it_fits(
    monkeypatch, capsys, words: tuple[str, ...]
) -> None:
    ran = run_here(monkeypatch, capsys, "estimate", "Qwen/Qwen2.5-7B", "--by-name", *words)
    assert ran.code == 2
    assert "7.0" in ran.out
    assert "10 %" in ran.out


def test_a_fitting_model_is_a_command_of_its_own_with_exit_code_0_and_no_ray_nor_torch() -> None:
    folder = str(CONFIGS / "qwen2.5-7b")
    ran = run_alone("estimate", folder, *H200, "--json", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert ran.code == 0
    assert json.loads(ran.out)["fits"]
    imported = {line.rpartition("|")[2].strip() for line in ran.err.splitlines()}
    assert "vram.estimate" in imported
    assert not imported & {"ray", "torch", "vllm", "transformers"}


@pytest.fixture
def taught(monkeypatch, tmp_path) -> Path:
    """A calibration file with one load of Qwen2.5-7B on an H200, a GiB heavier than estimated."""
    path = tmp_path / "calibration.jsonl"
    monkeypatch.setenv("BALLAST_CALIBRATION", str(path))
    own = shape("qwen2.5-7b")
    cards, _ = inventory("1xH200")
    found = answer("x", own, cards[0], "vllm", read_pins(["max_model_len=8192"]))
    said = {item.name: item.bytes for item in found.estimate.items}
    append_load(
        path,
        Load(
            load_id="a",
            at_s=1.0,
            architecture=own.architecture,
            shape=shape_hash(own),
            engine_version=engine_versions()["vllm"] or "0.29.0",
            kind=load_kind(found.settings, cards[0].device, "vllm"),
            estimated=said,
            measured={"weights": said["weights"] + GIB},
        ),
    )
    return path


def test_what_loads_here_have_taken_is_used_and_said(ballast, taught) -> None:
    words = (*H200, "--set", "max_model_len=8192")
    with_it = document(ballast("qwen2.5-7b", *words, "--json"))
    without = document(ballast("qwen2.5-7b", *words, "--json", "--no-calibration"))
    assert with_it["items"]["weights"] == without["items"]["weights"] + GIB
    assert with_it["items"]["kv_cache"] == without["items"]["kv_cache"] - GIB
    assert with_it["calibration"]["loads"] == 1
    assert without["calibration"] is None
    assert "Corrected by 1 loads" in ballast("qwen2.5-7b", *words).out
    assert "Corrected" not in ballast("qwen2.5-7b", *words, "--no-calibration").out


def test_a_relative_of_the_model_is_not_touched(ballast, taught) -> None:
    found = document(ballast("qwen2.5-14b", *H200, "--json"))
    assert found["calibration"] is None


def test_a_damaged_calibration_file_is_a_note(ballast, taught) -> None:
    taught.write_bytes(taught.read_bytes() + b"{torn\n\xff\n")
    found = document(ballast("qwen2.5-7b", *H200, "--json"))
    assert "2 lines cannot be read" in found["notes"][0]
    assert found["calibration"]["loads"] == 1


def test_a_cache_without_a_block_for_each_state_is_at_fault_and_short_of_bytes(ballast) -> None:
    found = document(ballast("mamba-codestral-7b", "--gpus", "1xH100", "--json"))
    assert (found["fits"], found["at_fault"]) == (False, "kv_cache")
    needed, available = re.search(r"needs ([\d.]+) GiB; ([\d.]+) GiB are", found["reason"]).groups()
    assert float(needed) > float(available)


def test_a_card_that_cannot_do_what_is_pinned_hides_no_other(ballast) -> None:
    pin = ("--set", "dtype=bfloat16", "--json")
    found = document(ballast("qwen2.5-7b", "--gpus", "1xT4, 1xH200", *pin))
    assert (found["card"]["name"], found["fits"]) == ("H200", True)
    assert any("not on T4" in note and "bfloat16" in note for note in found["notes"])
    assert "T4 has no bfloat16" in ballast("qwen2.5-7b", "--gpus", "1xT4", *pin).err


def test_a_layer_split_over_nodes_is_noted(ballast) -> None:
    pin = ("--set", "tensor_parallel_size=4", "--json")
    found = document(ballast("qwen2.5-7b", "--gpus", "2x2xH200", *pin))
    assert any("crosses nodes of 2" in note for note in found["notes"])
    assert document(ballast("qwen2.5-7b", "--gpus", "1x4xH200", *pin))["notes"] == []


@pytest.mark.parametrize(
    ("pin", "said"),
    [("num_speculative_tokens=5", "no draft model"), ("max_lora_rank=32", "no effect")],
)
def test_a_pin_that_changes_no_number_is_noted(ballast, pin: str, said: str) -> None:
    found = document(ballast("qwen2.5-7b", *H200, "--set", pin, "--json"))
    assert [said in note for note in found["notes"]] == [True]
