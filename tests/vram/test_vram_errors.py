import pickle

import pytest

from vram.errors import BallastError, DoesNotFit, Invalid, UnknownArchitecture, UnknownDtype
from vram.units import GIB

ERRORS = [
    Invalid("max_model_len is 0", "max_model_len"),
    UnknownArchitecture("FooForCausalLM", "its layers are not in our table."),
    UnknownDtype("int3", "float32, float16", "kv_cache_dtype"),
    DoesNotFit("Qwen3-32B", 81 * GIB, 72 * GIB, "It fits on 2 GPUs.", "tensor_parallel_size"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_survive_the_way_between_processes(error: BallastError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_here_asks_the_user_to_change_something(error: BallastError) -> None:
    assert isinstance(error, Invalid)
    assert error.setting or isinstance(error, UnknownArchitecture)


def test_a_memory_error_says_asked_needed_available_and_what_would_fit() -> None:
    error = DoesNotFit(
        "Qwen3-32B at 32768 tokens on an H100", 81 * GIB, 72 * GIB, "It fits on 2 GPUs.", "x"
    )
    assert str(error) == (
        "Qwen3-32B at 32768 tokens on an H100 needs 81.0 GiB; 72.0 GiB are available. "
        "It fits on 2 GPUs."
    )
