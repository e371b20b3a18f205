"""What the command says, in English and in Chinese. Knows no numbers and no layout.

Names of settings, cards, models and units are the same in both. A sentence is a template: the
caller has the values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from vram.errors import Invalid


class Language(StrEnum):
    EN = "en"
    ZH = "zh"


# As gettext looks for them; the first that is set decides.
LOCALE_VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")


@dataclass(frozen=True, slots=True)
class Phrase:
    """One template in both languages, with the same placeholders."""

    en: str
    zh: str


PHRASES: dict[str, Phrase] = {
    # What both `estimate` and `plan` say.
    "per_gpu": Phrase("per GPU", "每张 GPU"),
    "gpus": Phrase("{number} GPUs", "{number} 张 GPU"),
    "item": Phrase("item", "项目"),
    "size": Phrase("size", "大小"),
    "share": Phrase("share of the card", "占显卡比例"),
    "how": Phrase("how", "计算方法"),
    "source": Phrase("from", "来源"),
    "total": Phrase("total", "合计"),
    "budget": Phrase("budget of the engine", "引擎预算"),
    "device_use_under_load": Phrase("device under load", "负载下设备占用"),
    "card": Phrase("card", "显卡"),
    "fits": Phrase("It fits.", "可以运行。"),
    "does_not_fit": Phrase("It does not fit.", "无法运行。"),
    "settings": Phrase("settings", "参数"),
    "notes": Phrase("notes", "说明"),
    # Items of an estimate.
    "weights": Phrase("weights", "权重"),
    "kv_cache": Phrase("KV cache", "KV 缓存"),
    "peak_activation": Phrase("peak activation", "激活峰值"),
    "cuda_graphs": Phrase("CUDA graphs", "CUDA 图"),
    "non_torch": Phrase("non-torch", "框架外内存"),
    "communication": Phrase("communication", "通信缓冲"),
    "lora": Phrase("LoRA slots", "LoRA 槽位"),
    "draft_model": Phrase("draft model", "草稿模型"),
    "context": Phrase("CUDA context", "CUDA 上下文"),
    "runner_state": Phrase("runner state", "运行器状态"),
    "allocator_slack": Phrase("allocator slack", "分配器余量"),
    "learned": Phrase("learned from loads", "由实测修正"),
}


def say(language: Language, key: str, **values: object) -> str:
    """The phrase with its values; a key without one is a mistake of ours."""
    return getattr(PHRASES[key], language.value).format(**values)


def item_name(language: Language, name: str) -> str:
    """An item's name; one that is new in `vram` shows as it is called there."""
    return say(language, name) if name in PHRASES else name.replace("_", " ")


def language_of(wish: str | None, env: Mapping[str, str]) -> Language:
    """What is wished for, else what the locale says."""
    if wish is not None:
        if wish not in list(Language):
            raise Invalid(f"--lang is {wish[:20]!r}; it is {' or '.join(Language)}", "lang")
        return Language(wish)
    locale = next((env[name] for name in LOCALE_VARIABLES if env.get(name)), "")
    return Language.ZH if locale.lower().startswith("zh") else Language.EN
