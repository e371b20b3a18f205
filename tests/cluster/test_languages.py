"""Both languages say the same things."""

from string import Formatter

import pytest

from cluster.languages import PHRASES, Language, item_name, language_of, say
from vram.errors import Invalid


@pytest.mark.parametrize("key", PHRASES)
def test_both_languages_have_every_phrase_with_the_same_placeholders(key: str) -> None:
    phrase = PHRASES[key]
    assert phrase.en
    assert phrase.zh
    assert placeholders(phrase.en) == placeholders(phrase.zh)


def placeholders(text: str) -> set[str]:
    return {field for _, field, _, _ in Formatter().parse(text) if field is not None}


def test_a_phrase_is_filled_in_its_language() -> None:
    assert say(Language.EN, "gpus", number=8) == "8 GPUs"
    assert say(Language.ZH, "gpus", number=8) == "8 张 GPU"


def test_an_item_that_has_no_phrase_yet_shows_its_own_name() -> None:
    assert item_name(Language.ZH, "brand_new_item") == "brand new item"
    assert item_name(Language.ZH, "weights") == "权重"


@pytest.mark.parametrize(
    ("wish", "env", "language"),
    [
        ("zh", {"LANG": "en_US.UTF-8"}, Language.ZH),
        ("en", {"LANG": "zh_CN.UTF-8"}, Language.EN),
        (None, {"LANG": "zh_CN.UTF-8"}, Language.ZH),
        (None, {"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, Language.EN),
        (None, {"LC_MESSAGES": "zh_TW", "LANG": "en_US"}, Language.ZH),
        (None, {"LC_ALL": "", "LANG": "zh_CN"}, Language.ZH),
        (None, {"LANG": "de_DE.UTF-8"}, Language.EN),
        (None, {}, Language.EN),
    ],
)
def test_the_wish_decides_then_the_locale(
    wish: str | None, env: dict[str, str], language: Language
) -> None:
    assert language_of(wish, env) is language


def test_a_language_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(Invalid, match="en or zh"):
        language_of("tlh", {})
