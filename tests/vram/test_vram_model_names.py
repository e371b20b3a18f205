import pytest

from vram.errors import Invalid
from vram.model_names import approximate_parameters, approximate_weight_bytes


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2.5-7B", 7.0),
        ("meta-llama/Llama-3.2-1B-Instruct", 1.0),
        ("Qwen2.5-0.5B", 0.5),
        ("mistralai/Mixtral-8x7B-v0.1", 46.7),
        ("Qwen/Qwen3-235B-A22B", 235.0),
        ("HuggingFaceTB/SmolLM2-135M", 0.135),
        ("llama-70b-chat", 70.0),
    ],
)
def test_a_name_says_a_size_and_that_it_is_approximate(name: str, billions: float) -> None:
    found = approximate_parameters(name)
    assert found.parameters == pytest.approx(billions * 1e9, rel=0.01)
    assert "by the name" in found.note


@pytest.mark.parametrize("name", ["gpt2", "openai/whisper-large-v3", "7B/model", "", "x" * 10**6])
def test_a_name_without_a_size_is_an_error(name: str) -> None:
    with pytest.raises(Invalid, match="config"):
        approximate_parameters(name)


def test_seven_billion_in_16_bits_are_fourteen_gigabytes() -> None:
    # The seeds' example; the model has 15.23.
    assert approximate_weight_bytes("Qwen/Qwen2.5-7B", "float16") == 14_000_000_000
    four_bits = approximate_weight_bytes("Qwen/Qwen2.5-7B", "float16", "awq")
    assert four_bits == pytest.approx(3.64e9, rel=0.01)
