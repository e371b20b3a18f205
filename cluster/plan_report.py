"""A decision as text for people. Decides nothing; the words are in `plan_words`."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.languages import Language, item_name
from cluster.plan_command import Answer
from cluster.plan_words import say
from cluster.terminal import bar, one_line
from placement.choose import Placed, Unplaced
from placement.errors import NoRoom
from placement.explain import Change, Explanation, pins
from placement.options import Option, Refused
from placement.rooms import Slot
from vram.errors import DoesNotFit
from vram.ladder import Rung
from vram.plan import Plan
from vram.units import gib

# Options that nobody wants to read one by one.
MOST_REJECTED = 8


def show(answer: Answer, console: Console, language: Language) -> None:
    """Every model in the order of the config; those without a place last, as they need doing."""
    shown: set[str] = set()
    for placed in answer.decision.placed:
        name = placed.request.name
        if name in shown:
            continue
        shown.add(name)
        replicas = [p for p in answer.decision.placed if p.request.name == name]
        _show_model(placed, replicas, answer.explanations[name], console, language)
    for unplaced in answer.decision.unplaced:
        _show_unplaced(unplaced, console, language)
    console.print(_summary(answer, language), soft_wrap=True)


def _show_model(
    placed: Placed,
    replicas: list[Placed],
    explanation: Explanation,
    console: Console,
    language: Language,
) -> None:
    request = placed.request
    title = f"{request.name} · {placed.plan.engine} · {card_words(placed.plan, language)}"
    console.print(f"[bold]{escape(one_line(title))}[/bold]", soft_wrap=True)
    lines = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    lines.add_column(no_wrap=True, style="dim")
    lines.add_column(overflow="fold")

    def add(key: str, texts: Iterable[str]) -> None:
        found = [one_line(text) for text in texts]
        if found:
            lines.add_row(say(language, key), escape("\n".join(found)))

    add("where", _where(replicas, language))
    add("why", _why(placed, language))
    add("memory", _memory(placed.plan, language))
    add("settings", _settings(placed.plan))
    add("notes", placed.plan.notes)
    if placed.option is not None:
        add("rejected", _rejected(placed, explanation, language))
        add("smaller", _smaller(explanation, language))
    add("ladder", (_rung(rung, language) for rung in explanation.ladder[1:]))
    add("floor", [_floor(placed.plan, explanation, language)])
    console.print(lines)
    console.print()


def card_words(plan: Plan, language: Language) -> str:
    settings = plan.settings
    return what(
        plan.device.name,
        settings.tensor_parallel_size,
        settings.pipeline_parallel_size,
        plan.gpu_fraction,
        language,
    )


def what(card: str, tensor: int, pipeline: int, share: float, language: Language) -> str:
    """Cards as people count them."""
    number = tensor * pipeline
    if pipeline > 1:
        return say(language, "with_stages", number=number, card=card, stages=pipeline, group=tensor)
    if number > 1:
        return say(language, "several_cards", number=number, card=card)
    if share < 1:
        return say(language, "with_share", share=f"{share:.2f}", card=card)
    return card


def _where(replicas: list[Placed], language: Language) -> Iterator[str]:
    for placed in replicas:
        prefix = ""
        if len(replicas) > 1:
            prefix = say(language, "replicas", number=placed.replica) + ": "
        yield prefix + "; ".join(_slots(placed, language))


def _slots(placed: Placed, language: Language) -> Iterator[str]:
    of_node: dict[str, list[Slot]] = defaultdict(list)
    for slot in placed.slots:
        of_node[slot.node].append(slot)
    for node, slots in of_node.items():
        if slots[0].gpu < 0:
            size = gib(placed.plan.estimate.device_use_under_load_bytes)
            yield say(language, "ram_of", node=node, size=size)
            continue
        cards = _ranges([slot.gpu for slot in slots])
        if slots[0].share < 1:
            yield say(language, "share_of", node=node, cards=cards, share=f"{slots[0].share:.2f}")
        else:
            yield say(language, "card_of", node=node, cards=cards)


def _ranges(numbers: list[int]) -> str:
    """0-3, 6."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _why(placed: Placed, language: Language) -> Iterator[str]:
    if placed.option is None:
        yield say(language, "on_cpu")
    else:
        yield say(language, f"objective_{placed.request.objective}")
    if placed.num_fitting_nodes == 0:
        yield say(language, "spread")
    elif placed.num_fitting_nodes == 1:
        yield say(language, "only_node")
    else:
        yield say(language, "tightest", number=placed.num_fitting_nodes)


def _memory(plan: Plan, language: Language) -> Iterator[str]:
    estimated = plan.estimate
    limit_bytes = int(plan.device.total_bytes * plan.gpu_fraction)
    yield say(
        language,
        "under_load",
        used=gib(estimated.device_use_under_load_bytes),
        total=gib(limit_bytes),
        tokens=estimated.kv_cache_tokens,
    )
    items = [item for item in (*estimated.items, *estimated.outside) if item.bytes > 0]
    items.sort(key=lambda item: -item.bytes)
    yield bar(estimated.device_use_under_load_bytes / limit_bytes).rstrip()
    yield " + ".join(f"{item_name(language, item.name)} {gib(item.bytes)}" for item in items)


def _settings(plan: Plan) -> Iterator[str]:
    yield ", ".join(f"{setting}: {value}" for setting, value in pins(plan.settings).items())


def _rejected(placed: Placed, explanation: Explanation, language: Language) -> Iterator[str]:
    lines = [
        *(say(language, "passed_over", what=_of(o, language)) for o in placed.passed_over),
        *(
            say(language, "full_nodes", number=number, reason=reason)
            for reason, number in placed.full_nodes
        ),
        *(_refused(refused, language) for refused in explanation.refused),
        *(_not_taken(option, language) for option in explanation.not_taken),
    ]
    yield from lines[:MOST_REJECTED] or [say(language, "nothing_rejected")]
    if len(lines) > MOST_REJECTED:
        yield f"… +{len(lines) - MOST_REJECTED}"


def _of(option: Option, language: Language) -> str:
    text = card_words(option.plan, language)
    return f"{text}, kv_cache_dtype fp8" if option.fp8_cache else text


def _refused(refused: Refused, language: Language) -> str:
    where = what(
        refused.device.name,
        refused.tensor_parallel_size,
        refused.pipeline_parallel_size,
        1.0,
        language,
    )
    if refused.problem:
        return say(language, "impossible", what=where, problem=refused.problem)
    key = "too_small" if refused.needed_bytes > refused.available_bytes else "no_share"
    return say(
        language,
        key,
        what=where,
        needed=gib(refused.needed_bytes),
        available=gib(refused.available_bytes),
    )


def _not_taken(option: Option, language: Language) -> str:
    if option.comfortable:
        return say(language, "not_taken", what=_of(option, language))
    tokens = option.plan.settings.max_model_len
    return say(language, "cramped", what=_of(option, language), tokens=tokens)


def _smaller(explanation: Explanation, language: Language) -> Iterator[str]:
    smaller = explanation.smaller
    if smaller is None:
        yield say(language, "no_smaller")
    elif smaller.plan is None and smaller.refused is not None:
        yield _refused(smaller.refused, language)
    elif smaller.plan is None:
        yield say(language, "smaller_refused", what=smaller.device.name)
    elif not smaller.changes:
        yield say(language, "smaller_same", what=card_words(smaller.plan, language))
    else:
        changed = ", ".join(_change(change) for change in smaller.changes)
        yield say(
            language, "smaller_costs", what=card_words(smaller.plan, language), changes=changed
        )


def _change(change: Change) -> str:
    return f"{change.setting} {change.before} → {change.after}"


def _rung(rung: Rung, language: Language) -> str:
    if rung.skipped_reason is not None:
        return f"{rung.name} ({say(language, 'skipped', reason=rung.skipped_reason)})"
    return f"{rung.name}: {rung.price}"


def _floor(plan: Plan, explanation: Explanation, language: Language) -> str:
    floor = explanation.floor
    values = {"needed": gib(floor.needed_bytes), "tokens": plan.settings.max_model_len}
    if floor.lowest_share is None:
        return say(language, "floor_bytes", **values)
    return say(language, "floor_share", share=f"{floor.lowest_share:.2f}", **values)


def _show_unplaced(unplaced: Unplaced, console: Console, language: Language) -> None:
    name = unplaced.request.name
    number = f" · {say(language, 'replicas', number=unplaced.replica)}"
    title = name + (number if unplaced.request.num_replicas > 1 else "")
    problem = say(language, "unplaced", problem=refusal_words(unplaced, language))
    console.print(
        f"[bold red]{escape(one_line(title))}[/bold red]  {escape(one_line(problem))}",
        soft_wrap=True,
    )


def refusal_words(unplaced: Unplaced, language: Language) -> str:
    error = unplaced.error
    if isinstance(error, DoesNotFit):
        return say(
            language,
            "does_not_fit",
            asked=error.asked,
            needed=gib(error.needed_bytes),
            available=gib(error.available_bytes),
            would_fit=error.would_fit,
            setting=error.setting,
        )
    if isinstance(error, NoRoom):
        needed = what(error.card, error.num_gpus, 1, error.share, language)
        return say(language, "no_room", problem=str(error), what=needed)
    return str(error)


def _summary(answer: Answer, language: Language) -> str:
    decision = answer.decision
    asked = len(decision.placed) + len(decision.unplaced)
    total = sum(kind.total for kind in decision.kinds)
    cards = {(s.node, s.gpu) for p in decision.placed for s in p.slots if s.gpu >= 0}
    key = "summary" if total else "summary_cpu"
    return say(
        language, key, placed=len(decision.placed), asked=asked, cards=len(cards), total=total
    )
