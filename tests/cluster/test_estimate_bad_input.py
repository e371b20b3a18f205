"""Whatever is asked for wrongly is one line on standard error, at once and in little memory."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import CONFIGS, Ran, run_alone, run_here

from vram.units import MIB

QWEN = str(CONFIGS / "qwen2.5-7b")
MOST_CPU_S = 1.0
MOST_BYTES = 200 * MIB
UNREACHABLE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "", "HF_HUB_OFFLINE": "0"}


@pytest.fixture
def refused(monkeypatch, capsys) -> Callable[..., str]:
    def run(*words: str) -> str:
        return run_here(monkeypatch, capsys, "estimate", *words).only_error

    return run


@pytest.fixture
def folder_with(tmp_path: Path) -> Callable[..., str]:
    """Qwen2.5-7B with other values in its config.json; None takes a key out."""

    def write(**changes: Any) -> str:
        config = json.loads((CONFIGS / "qwen2.5-7b/config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_hidden_layers": -28}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": -3584}, "hidden_size"),
        ({"hidden_size": "3584; DROP TABLE"}, "hidden_size"),
        ({"hidden_size": 1e308}, "hidden_size"),
        ({"vocab_size": [1, 2]}, "vocab_size"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"torch_dtype": "int3"}, "int3"),
        ({"architectures": ["FooForCausalLM"]}, "Foo"),
        ({"architectures": None}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"quantization_config": {"quant_method": "magic"}}, "magic"),
        ({"quantization_config": {"quant_method": "gptq"}}, "no quantization_config.bits"),
        ({"quantization_config": {"quant_method": "awq"}}, "no quantization_config.bits"),
        ({"quantization_config": "fp8"}, "quantization_config"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_hostile_config_is_refused_with_the_key_at_fault(
    refused, folder_with, changes: dict[str, Any], said: str
) -> None:
    assert said in refused(folder_with(**changes), "--gpus", "1xH200")


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"architectures": ["Qwen2ForC',
        "[]",
        "null",
        "\xff\xfe",
        "[" * 100_000,
        "3",
        '{"a": NaN',
    ],
    ids=["empty", "truncated", "list", "null", "not utf-8", "nested", "number", "nan"],
)
def test_a_config_that_is_no_object_is_refused(refused, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refused(str(tmp_path), "--gpus", "1xH200")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", "0xH200"), "0xH200"),
        (("--gpus", "8x0xH200"), "GPUs"),
        (("--gpus", ""), "inventory"),
        (("--gpus", "1xH900"), "known are"),
        (("--gpus", "cpu:0"), "no memory"),
        (("--gpus", "999999999xH200"), "100000"),
        (("--engine", "tgi"), "known are vllm"),
        (("--set", "max_model_len=131073"), "rope_scaling"),
        (("--set", "max_model_len=0"), "max_model_len"),
        (("--set", "max_model_len=-1"), "max_model_len"),
        (("--set", "max_model_len=8k"), "whole number"),
        (("--set", "max_model_len"), "key=value"),
        (("--set", "max_model_len="), "whole number"),
        (("--set", "max_num_seqs=" + "9" * 5000), "max_num_seqs"),
        (("--set", "dtype="), "no value"),
        (("--set", "dtype=int3"), "int3"),
        (("--set", "kv_cache_dtype=fp3"), "fp3"),
        (("--set", "quantization=magic"), "magic"),
        (("--set", "gpu_memory_utilization=1.5"), "at most 1"),
        (("--set", "gpu_memory_utilization=nan"), "gpu_memory_utilization"),
        (("--set", "kv_cache_memory_bytes=0"), "at least 1"),
        (("--set", "enforce_eager=perhaps"), "true or false"),
        (("--set", "tensor_parallel_size=3"), "28"),
        (("--set", "tensor_parallel_size=0"), "tensor_parallel_size is 0"),
        (("--set", "pipeline_parallel_size=0"), "pipeline_parallel_size is 0"),
        (
            ("--gpus", "2xH200", "--engine", "transformers", "--set", "tensor_parallel_size=2"),
            "one GPU",
        ),
        (("--set", "pipeline_parallel_size=64"), "layers"),
        (("--set", "max_num_seqs=100", "--set", "max_num_batched_tokens=50"), "max_num_seqs"),
        (("--set", "max_num_seqs=1", "--set", "max_num_seqs=2"), "twice"),
        (("--set", "swap_space=4"), "known are dtype, quantization"),
        (("--lang", "tlh"), "en or zh"),
        (("--bogus",), "--bogus"),
        (("--gpus",), "--gpus"),
        (("one", "too", "many"), "one"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else value,
)
def test_a_wrong_option_is_refused_with_what_would_be_right(
    refused, words: tuple[str, ...], said: str
) -> None:
    given = words if "--gpus" in words or words[0] == "one" else (*words, "--gpus", "1xH200")
    assert said in refused(QWEN, *given)


@pytest.mark.parametrize(
    "model", ["./nowhere", "/nowhere/at/all", "~nobody/x", "a b", "x" * 100_000, "a\nb", "../", ""]
)
def test_what_is_neither_folder_nor_name_is_refused(refused, model: str) -> None:
    refused("--gpus", "1xH200", "--", model)


def test_a_folder_without_config_is_refused(refused, tmp_path: Path) -> None:
    assert "config.json" in refused(str(tmp_path), "--gpus", "1xH200")


def frugal(ran: Ran) -> str:
    assert ran.cpu_s < MOST_CPU_S
    assert ran.peak_bytes < MOST_BYTES
    return ran.only_error


def test_a_command_of_its_own_refuses_a_header_of_two_gigabytes(folder_with, tmp_path) -> None:
    folder = folder_with()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2 << 30) + b"{")
        file.truncate(3 << 30)  # sparse: it takes no disk
    assert "2147483648 bytes" in frugal(run_alone("estimate", folder, "--gpus", "1xH200"))


def test_a_command_of_its_own_refuses_a_trillion_layers(folder_with) -> None:
    folder = folder_with(num_hidden_layers=10**12)
    assert "num_hidden_layers" in frugal(run_alone("estimate", folder, "--gpus", "1xH200"))


def test_a_hub_that_cannot_be_reached_is_said_beside_what_the_name_says(tmp_path: Path) -> None:
    env = {**UNREACHABLE, "HF_HOME": str(tmp_path)}
    said = frugal(run_alone("estimate", "Nobody/Nothing-7B", "--gpus", "1xH200", env=env))
    assert "Hub" in said
    assert "7.0 billion" in said
    said = frugal(run_alone("estimate", "gpt2", "--gpus", "1xH200", env=env))
    assert "billion" not in said


@pytest.mark.parametrize(("name", "said"), [("model.gguf", "GGUF"), ("config.json", "a folder")])
def test_a_file_is_no_model(refused, tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_text("{}")
    assert said in refused(str(tmp_path / name), "--gpus", "1xH200")


def test_a_machine_finds_a_refusal_where_it_looks_for_the_reason(monkeypatch, capsys) -> None:
    ran = run_here(
        monkeypatch, capsys, "estimate", QWEN, "--gpus", "1xH200", "--set", "max_model_len=131073",
        "--json",
    )  # fmt: skip
    found = json.loads(ran.out)
    assert ran.code == 2
    assert (found["fits"], found["setting"]) == (False, "max_model_len")
    assert found["reason"] in ran.err
    assert ran.err.count("\n") == 1
