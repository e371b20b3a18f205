"""Real tokenizers, made in the test: byte-level BPE, and a chat template."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_openai_harness import Ladder, serving
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from deployments.openai.detokenizer import Detokenizer
from deployments.openai.errors import RequestError
from deployments.openai.tokenizers import MAX_INLINE_CHARS, ByteTokenizer, TransformersTokenizer

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>"
    "{% endfor %}{% if thinks %}<think>{% endif %}<|start|>assistant"
)


def make_tokenizer(chat_template: str | None = TEMPLATE) -> TransformersTokenizer:
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("Ġ", "w"),
        ("ð", "Ł"),
        ("Ł", "ĺ"),
    ]
    pieces = [*alphabet, *("".join(pair) for pair in merges)]  # fmt: skip
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = Backend(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|start|>", "<|end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", chat_template=chat_template
    )
    return TransformersTokenizer(tokenizer, eos_token_ids=(3,))


@pytest.fixture(scope="module")
def tokenizer() -> TransformersTokenizer:
    return make_tokenizer()


@settings(deadline=None, max_examples=50)
@given(st.text(st.sampled_from("hello wörld 😀👩‍👩‍👧你好")))
def test_a_text_comes_back_token_by_token(text: str) -> None:
    token_ids = _TOKENIZER.encode(text)
    detokenizer = Detokenizer(_TOKENIZER.decode)
    said = [detokenizer.feed((token,)) for token in token_ids]
    assert "".join(said) == text
    assert b"".join(map(_TOKENIZER.token_bytes, token_ids)) == text.encode()


_TOKENIZER = make_tokenizer()


def test_long_and_short_texts_have_the_same_tokens(tokenizer: TransformersTokenizer) -> None:
    text = "hello world " * (MAX_INLINE_CHARS // 10)
    whole = tokenizer.encode(text)
    assert len(text) > MAX_INLINE_CHARS
    assert tokenizer.decode(whole) == text
    assert whole[:20] == tokenizer.encode("hello world " * 10)[:20]


def test_control_tokens_have_no_text_but_bytes(tokenizer: TransformersTokenizer) -> None:
    (end,) = tokenizer.encode("<|end|>")
    assert tokenizer.decode((end,)) == ""
    assert tokenizer.token_bytes(end) == b"<|end|>"
    assert tokenizer.eos_token_ids == {end, 3}


def test_a_part_of_a_character_has_its_own_bytes(tokenizer: TransformersTokenizer) -> None:
    token_ids = tokenizer.encode("😀")
    assert len(token_ids) > 1
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == "😀".encode()


def test_a_conversation_is_rendered_up_to_the_assistant(tokenizer: TransformersTokenizer) -> None:
    messages = [{"role": "user", "content": "hello"}]
    rendered = "<|start|>user\nhello<|end|><|start|>assistant"
    assert tokenizer.apply_chat_template(messages, {}) == tokenizer.encode(rendered)
    thinking = rendered.replace("<|end|>", "<|end|><think>")
    kwargs = {"thinks": True}
    assert tokenizer.apply_chat_template(messages, kwargs) == tokenizer.encode(thinking)


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "conversation", "return_tensors"])
def test_a_request_can_t_change_how_templates_are_applied(
    tokenizer: TransformersTokenizer, name: str
) -> None:
    with pytest.raises(RequestError) as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], {name: "x"})
    assert caught.value.param == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        ("{{ 'a' + messages[0]['content'] }}", [{"role": "user"}]),
        ("{{ raise_exception('only users') }}", [{"role": "system", "content": "hi"}]),
        ("{{ messages[0]['content'] + 1 }}", [{"role": "user", "content": "hi"}]),
        ("{{ messages[5]['content']['x'] }}", [{"role": "user", "content": "hi"}]),
        (None, [{"role": "user", "content": "hi"}]),
    ],
)
def test_messages_that_the_template_can_t_take_are_the_client_s_mistake(
    template: str | None, messages: list[dict[str, Any]]
) -> None:
    with pytest.raises(RequestError) as caught:
        make_tokenizer(template).apply_chat_template(messages, {})
    assert caught.value.param == "messages"


async def test_token_ids_beyond_the_vocabulary_are_refused(
    ladder: Ladder, tokenizer: TransformersTokenizer
) -> None:
    async with serving(ladder, tokenizer=tokenizer) as served, served.client() as client:
        asked = {"prompt": [tokenizer.vocabulary_size]}
        response = await client.post("/v1/completions", json=asked)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "prompt"


async def test_a_long_prompt_is_tokenised_beside_the_event_loop(ladder: Ladder) -> None:
    import threading

    class Watched(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            threads.append(threading.current_thread())
            return super().encode(text)

    threads: list[threading.Thread] = []
    async with serving(ladder, tokenizer=Watched()) as served, served.client() as client:
        for prompt in ("short", "long" * MAX_INLINE_CHARS):
            await client.post("/v1/completions", json={"prompt": prompt})
    assert [thread is threading.main_thread() for thread in threads] == [True, False]
