"""What `ballast estimate` prints: JSON in bytes for machines, a table with bars for people."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.text import Text

from cluster.estimate_command import Answer, ByName, Refusal
from cluster.languages import Language, item_name, say
from cluster.terminal import bar, table
from vram.estimate import Item
from vram.remedy import Remedy, describe
from vram.units import gib

OUTSIDE_STYLE = "dim"


def as_json(found: Sequence[Answer], language: Language) -> dict[str, Any]:
    """The first answer per GPU and in bytes, with one line for each other kind of card."""
    chosen, *others = found
    estimate = chosen.estimate
    return {
        "model": chosen.model,
        "engine": chosen.engine,
        "card": {"name": chosen.cards.device.name, "total_bytes": chosen.cards.device.total_bytes},
        "num_gpus": chosen.settings.num_gpus,
        "items": {item.name: item.bytes for item in estimate.items},
        "outside": {item.name: item.bytes for item in estimate.outside},
        "at_peak": {item.name: item.bytes for item in estimate.at_peak},
        "total": estimate.total_bytes,
        "budget": estimate.budget_bytes,
        "device_use_under_load": estimate.device_use_under_load_bytes,
        "device_use_at_peak": estimate.device_use_at_peak_bytes,
        "kv_cache_tokens": estimate.kv_cache_tokens,
        "kv_cache_bytes_per_token": estimate.token_bytes,
        "kv_cache_bytes_per_sequence": estimate.sequence_bytes,
        "settings": asdict(chosen.settings),
        "fits": chosen.fits,
        "reason": reason(chosen, language),
        "at_fault": chosen.refusal.at_fault if chosen.refusal else None,
        "remedies": [_turned(each) for each in chosen.refusal.remedies] if chosen.refusal else [],
        "notes": list(chosen.notes),
        "calibration": _calibration(chosen),
        "formulas": {
            item.name: {"formula": item.formula, "source": item.source}
            for item in (*estimate.items, *estimate.outside, *estimate.at_peak)
        },
        "other_cards": [
            {
                "name": other.cards.device.name,
                "num_gpus": other.settings.num_gpus,
                "fits": other.fits,
                "total": other.estimate.total_bytes,
                "device_use_under_load": other.estimate.device_use_under_load_bytes,
                "reason": reason(other, language),
            }
            for other in others
        ],
    }


def _calibration(answer: Answer) -> dict[str, Any] | None:
    learned = answer.learned
    if learned is None:
        return None
    return {
        "loads": learned.num_loads,
        "engine_version": learned.engine_version,
        "learned": dict(learned.amounts),
    }


def reason(answer: Answer, language: Language) -> str:
    """Why it does not fit: what is at fault, asked, needed, available, what would; else empty."""
    refusal = answer.refusal
    if refusal is None:
        return ""
    sentences = []
    if answer.gpus_missing:
        sentences.append(
            say(
                language,
                "too_few_gpus",
                asked=answer.settings.num_gpus,
                available=answer.cards.number,
                card=answer.cards.device.name,
            )
        )
    if not answer.estimate.fits:
        # The sentence of `vram` has the numbers of its item; it speaks English only.
        sentences += [answer.estimate.reason] if language is Language.EN else []
        sentences.append(_asked(answer, refusal, language))
        sentences.append(_would_fit(refusal, language))
    # No space between Chinese sentences.
    return ("" if language is Language.ZH else " ").join(sentences)


def draw(console: Console, found: Sequence[Answer], language: Language) -> None:
    """The table of the first answer, what follows from it, and the other kinds of card."""
    chosen, *others = found
    console.print(Group(*_parts(chosen, language)))
    for other in others:
        key = "other_fits" if other.fits else "other_does_not_fit"
        line = say(
            language,
            key,
            card=other.cards.device.name,
            number=other.settings.num_gpus,
            size=gib(other.estimate.device_use_under_load_bytes),
        )
        console.print(escape(line))


def approximation_json(found: ByName) -> dict[str, Any]:
    """Only the weights are known, so nothing says that it fits."""
    return {
        "model": found.model,
        "approximate": True,
        "parameters": found.parameters,
        "items": {"weights": found.weight_bytes},
        "fits": False,
        "reason": found.note,
    }


def approximation_line(found: ByName, language: Language) -> Text:
    return Text(
        say(
            language,
            "by_name",
            parameters=f"{found.parameters / 1e9:.1f}",
            size=gib(found.weight_bytes),
            form=found.form,
        )
    )


def _parts(answer: Answer, language: Language) -> Iterator[RenderableType]:
    estimate, settings = answer.estimate, answer.settings
    device = answer.cards.device
    title = f"{answer.model} · {answer.engine} · {settings.num_gpus} × {device.name}"
    yield Text(f"{title} · {gib(device.total_bytes)}", style="bold")
    yield _table(answer, language)
    if estimate.sequence_bytes:
        yield Text(
            say(
                language,
                "cache_line",
                tokens=f"{estimate.kv_cache_tokens:,}",
                sequences=f"{estimate.item('kv_cache').bytes / estimate.sequence_bytes:,.1f}",
                context=settings.max_model_len,
            )
        )
    pairs = ", ".join(
        f"{name}={_short(value)}" for name, value in asdict(settings).items() if value is not None
    )
    yield Text(f"{say(language, 'settings')}: {pairs}", style=OUTSIDE_STYLE)
    items = [i for i in (*estimate.items, *estimate.outside, *estimate.at_peak) if i.bytes]
    for source in dict.fromkeys(item.source for item in items):
        names = ", ".join(item_name(language, i.name) for i in items if i.source == source)
        yield Text(f"{say(language, 'source')} {source}: {names}", style=OUTSIDE_STYLE)
    if answer.learned is not None:
        yield Text(
            say(
                language,
                "calibrated",
                loads=answer.learned.num_loads,
                engine=answer.engine,
                version=answer.learned.engine_version,
            )
        )
    for note in answer.notes:
        yield Text(f"{say(language, 'notes')}: {note}")
    if answer.refusal is None:
        yield Text(say(language, "fits"), style="bold green")
        return
    verdict = say(language, "does_not_fit")
    yield Text.assemble((verdict, "bold red"), " ", reason(answer, language))
    for remedy in answer.refusal.remedies:
        pinned = " ".join(f"--set {key}={value}" for key, value in _turned(remedy).items())
        yield Text(f"  {_words(remedy, language)}: {pinned}")


def _table(answer: Answer, language: Language) -> RenderableType:
    estimate, total_bytes = answer.estimate, answer.cards.device.total_bytes
    drawn = table(
        say(language, "per_gpu"),
        say(language, "size"),
        say(language, "share"),
        say(language, "how"),
        right=(1,),
    )

    def row(name: str, size_bytes: int, item: Item | None = None, style: str = "") -> None:
        how = item.formula if item else ""
        cells = (name, gib(size_bytes), bar(size_bytes / total_bytes), how)
        drawn.add_row(*map(escape, cells), style=style)

    for item in estimate.items:
        row(item_name(language, item.name), item.bytes, item)
    drawn.add_section()
    row(say(language, "total"), estimate.total_bytes, style="bold")
    row(say(language, "budget"), estimate.budget_bytes, style=OUTSIDE_STYLE)
    drawn.add_section()
    for item in estimate.outside:
        row(item_name(language, item.name), item.bytes, item)
    row(say(language, "device_use_under_load"), estimate.device_use_under_load_bytes, style="bold")
    if any(item.bytes for item in estimate.at_peak):
        for item in estimate.at_peak:
            row(item_name(language, item.name), item.bytes, item)
        row(say(language, "device_use_at_peak"), estimate.device_use_at_peak_bytes)
    return drawn


def _asked(answer: Answer, refusal: Refusal, language: Language) -> str:
    device, settings = answer.cards.device, answer.settings
    where = describe(device, settings.num_gpus)
    if language is Language.ZH:
        where = f"{settings.num_gpus} × {device.name}"
    return say(
        language,
        "asked",
        model=answer.model,
        context=settings.max_model_len,
        where=where,
        needed=gib(refusal.needed_bytes),
        available=gib(refusal.available_bytes),
        item=item_name(language, refusal.at_fault),
    )


def _would_fit(refusal: Refusal, language: Language) -> str:
    if not refusal.remedies:
        return say(language, "nothing_fits")
    joined = say(language, "or").join(_words(remedy, language) for remedy in refusal.remedies)
    return say(language, "would_fit", remedies=joined)


def _words(remedy: Remedy, language: Language) -> str:
    value = remedy.value
    text = say(
        language,
        f"remedy_{remedy.setting}",
        value=f"{value:.2f}" if remedy.setting == "gpu_memory_utilization" else value,
        gpus=remedy.num_gpus,
    )
    for name, other in remedy.also:
        text += say(language, "remedy_and", setting=name, value=other)
    return text


def _turned(remedy: Remedy) -> dict[str, int | float | str]:
    return {remedy.setting: remedy.value, **dict(remedy.also)}


def _short(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
