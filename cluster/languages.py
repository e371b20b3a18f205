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
    "device_use_at_peak": Phrase("device at its fullest", "设备最大占用"),
    "card": Phrase("card", "显卡"),
    "fits": Phrase("It fits.", "可以运行。"),
    "does_not_fit": Phrase("It does not fit.", "无法运行。"),
    "settings": Phrase("settings", "参数"),
    "notes": Phrase("notes", "说明"),
    # `ballast estimate`
    "cache_line": Phrase(
        "KV cache: {tokens} tokens, {sequences} sequences of {context}",
        "KV 缓存：{tokens} tokens，即 {sequences} 个长度为 {context} 的序列",
    ),
    "asked": Phrase(
        "{model} at {context} tokens on {where} needs {needed}; {available} are available. "
        "At fault: {item}.",
        "{model}（{context} tokens）在 {where} 上每张需要 {needed}，可用 {available}；"
        "不足的项目：{item}。",
    ),
    "would_fit": Phrase("It fits {remedies}.", "{remedies}则可以运行。"),
    "or": Phrase(", or ", "，或"),
    "nothing_fits": Phrase(
        "No setting makes it fit here; take a larger card or a smaller model.",
        "没有任何参数能使其运行：请换更大的显卡或更小的模型。",
    ),
    "too_few_gpus": Phrase(
        "{asked} GPUs are asked for and {available} of {card} are there: "
        "lower tensor_parallel_size or pipeline_parallel_size, or give more with --gpus.",
        "请求 {asked} 张 GPU，而 {card} 只有 {available} 张："
        "请降低 tensor_parallel_size 或 pipeline_parallel_size，或用 --gpus 给出更多。",
    ),
    "other_fits": Phrase(
        "{number} × {card}: it fits, {size} per GPU under load",
        "{number} × {card}：可以运行，负载下每张 {size}",
    ),
    "other_does_not_fit": Phrase(
        "{number} × {card}: it does not fit, {size} per GPU under load",
        "{number} × {card}：无法运行，负载下每张 {size}",
    ),
    "by_name": Phrase(
        "An approximation from the name alone: {parameters} billion parameters, {size} of weights "
        "in {form}, off by up to 10 %. Whether it fits, only config.json can say.",
        "仅按名称近似：{parameters} 十亿参数，{form} 权重 {size}，误差可达 10 %。"
        "能否运行须由 config.json 判断。",
    ),
    "calibrated": Phrase(
        "Corrected by {loads} loads of this kind here ({engine} {version}); "
        "--no-calibration shows the formulas alone.",
        "已按本机 {loads} 次同类加载修正（{engine} {version}）；--no-calibration 只显示公式结果。",
    ),
    # What would fit.
    "remedy_kv_cache_memory_bytes": Phrase(
        "with {value} bytes of KV cache", "KV 缓存设为 {value} 字节"
    ),
    "remedy_gpu_memory_utilization": Phrase(
        "at gpu_memory_utilization {value}", "gpu_memory_utilization 设为 {value}"
    ),
    "remedy_max_model_len": Phrase("at {value} tokens", "max_model_len 设为 {value}"),
    "remedy_max_num_batched_tokens": Phrase(
        "with {value} batched tokens", "max_num_batched_tokens 设为 {value}"
    ),
    "remedy_max_num_seqs": Phrase("with {value} sequences at once", "max_num_seqs 设为 {value}"),
    "remedy_memory": Phrase("in {value} GiB of RAM", "给予 {value} GiB 内存"),
    "remedy_tensor_parallel_size": Phrase("on {gpus} GPUs", "使用 {gpus} 张 GPU"),
    "remedy_quantization": Phrase("with {value} weights", "权重量化为 {value}"),
    "remedy_and": Phrase(" and {setting} {value}", "且 {setting} 设为 {value}"),
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
    "split_accumulators": Phrase("split accumulators", "分段累加器"),
    "encoder_batch": Phrase("images", "图像编码批次"),
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
