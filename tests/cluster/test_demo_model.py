"""The demo model loads where a real one does, and its greedy answers leave no room for noise."""

from pathlib import Path

import pytest

from cluster.demo_model import MARKER, build_demo_model
from cluster.demo_tokens import IM_END

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MIN_MARGIN = 1.0  # logits; 256 prompts of 0 to 200 words x 256 steps: 1.85, noise 2e-5
QUESTIONS = [
    "Hello!",
    "你好，世界",
    "Which ship carries the most ballast, and why does it not sink?",
    " ".join(f"word{number}" for number in range(60)),
    '{"json": [1, 2, 3]}\n\n\tprint("x")',
    "a",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "demo"
    build_demo_model(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")


@pytest.fixture(scope="module")
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return [_chat_prompt(tokenizer, question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def answers(model, prompts) -> list[list[int]]:
    return [_greedy(model, prompt, 96) for prompt in prompts]


def test_one_seed_gives_the_same_bytes_and_another_seed_gives_others(folder, tmp_path):
    build_demo_model(tmp_path / "same")
    build_demo_model(tmp_path / "other", seed=1)
    for path in sorted(folder.iterdir()):
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes(), path.name
    weights = "model.safetensors"
    assert (tmp_path / "other" / weights).read_bytes() != (folder / weights).read_bytes()


def test_a_complete_folder_is_left_alone(tmp_path):
    build_demo_model(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    build_demo_model(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", ["no marker", "half a marker", "old version", "file missing"])
def test_an_incomplete_folder_is_built_again(damage, folder, tmp_path):
    build_demo_model(tmp_path)
    match damage:
        case "no marker":
            (tmp_path / MARKER).unlink()
        case "half a marker":
            (tmp_path / MARKER).write_text('{"version":')
        case "old version":
            (tmp_path / MARKER).write_text('{"version": "0", "seed": 0, "files": []}')
        case "file missing":
            (tmp_path / "tokenizer.json").unlink()
    build_demo_model(tmp_path)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_it_is_a_qwen2_of_about_1_3_million_parameters_in_float32(model):
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.dtype == torch.float32
    assert 1_200_000 < model.num_parameters() < 1_400_000


@pytest.mark.parametrize(
    "text", ["Hello, how are you?", "Naïve 你好 🚢", "  two\n\nlines\t", "ba bar ban"]
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_is_chatml(tokenizer, prompts):
    assert tokenizer.decode(prompts[0]) == (
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token == IM_END


def test_the_best_token_leads_clearly_at_every_step(model, prompts, answers):
    for prompt, answer in zip(prompts, answers, strict=True):
        best, second = _logits_of_answer(model, prompt, answer).topk(2).values.unbind(-1)
        assert (best - second).min() > MIN_MARGIN


def test_one_pass_over_an_answer_finds_the_tokens_of_its_steps(model, prompts, answers):
    for prompt, answer in zip(prompts, answers, strict=True):
        assert _logits_of_answer(model, prompt, answer).argmax(-1).tolist() == answer


def test_a_batch_answers_as_each_request_alone(model, tokenizer, prompts, answers):
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**batch, max_new_tokens=96)
    assert output[:, batch["input_ids"].shape[1] :].tolist() == answers


@pytest.mark.parametrize("emitted", [1, 40, 95])
def test_a_replay_continues_after_the_last_emitted_token(model, prompts, answers, emitted):
    for prompt, answer in zip(prompts, answers, strict=True):
        replayed = _greedy(model, prompt + answer[:emitted], 96 - emitted)
        assert answer[:emitted] + replayed == answer


def test_answers_vary_and_can_be_printed(tokenizer, answers):
    assert len({tuple(answer) for answer in answers}) == len(answers)
    for answer in answers:
        assert len(answer) == 96
        assert len(set(answer)) > 60
        assert tokenizer.decode(answer).isprintable()


def test_an_answer_ends_by_itself_when_the_prompt_asks_for_it(model, tokenizer):
    prompt = _chat_prompt(tokenizer, "Be brief. <|stop_soon|>")
    answer = _greedy(model, prompt, 96)
    assert 8 < len(answer) < 41
    assert tokenizer.decode(answer[-1:]) == IM_END


def _chat_prompt(tokenizer, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def _greedy(model, prompt: list[int], max_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens)
    return output[0, len(prompt) :].tolist()


def _logits_of_answer(model, prompt: list[int], answer: list[int]):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0]
    return logits[len(prompt) - 1 : -1]
