"""The status of a server as a table for people. Asks nothing and has no clock."""

import math
from collections.abc import Callable
from datetime import datetime

from rich.console import Console
from rich.markup import escape

from cluster.languages import Language, Phrase
from cluster.status_command import Replica, Status
from cluster.terminal import one_line, table
from deployments.supervisor import State

PHRASES: dict[str, Phrase] = {
    "model": Phrase("model", "模型"),
    "replica": Phrase("replica", "副本"),
    "state": Phrase("state", "状态"),
    "settings": Phrase("settings", "参数"),
    "given_up": Phrase("given up", "已放弃"),
    "since": Phrase("since", "自"),
    "next_climb": Phrase("next climb", "下次回升"),
    "degraded": Phrase("degraded", "已降级"),
    "soon": Phrase("when idle", "空闲时"),
    "in_minutes": Phrase("in {minutes} min", "{minutes} 分钟后"),
    "unknown": Phrase("when there is room", "有空间时"),
    "failed_climbs": Phrase("{next} ({number} failed)", "{next}（已失败 {number} 次）"),
    "none": Phrase("No model is served there.", "该服务器上没有模型。"),
    "all_well": Phrase(
        "All {number} replicas serve as asked.", "全部 {number} 个副本均按要求的参数运行。"
    ),
    "not_well": Phrase(
        "{degraded} of {number} replicas are degraded, {down} are not serving.",
        "{number} 个副本中 {degraded} 个已降级，{down} 个未在服务。",
    ),
}


def say(language: Language, key: str, **values: object) -> str:
    """The phrase with its values; a key without one is a mistake of ours."""
    return getattr(PHRASES[key], language.value).format(**values)


def show(status: Status, console: Console, language: Language, *, now_s: float) -> None:
    """Every replica on a line, then what is wrong in one sentence."""
    if not status.replicas:
        console.print(say(language, "none"))
        return
    columns = ("model", "replica", "state", "settings", "given_up", "since", "next_climb")
    drawn = table(*(say(language, column) for column in columns))
    for replica in status.replicas:
        drawn.add_row(*(escape(one_line(cell)) for cell in _cells(replica, language, now_s)))
    console.print(drawn)
    for replica in status.replicas:
        if replica.state != State.READY and replica.reason:
            reason = f"{replica.model}: {replica.reason}"
            console.print(escape(one_line(reason)), soft_wrap=True)
    console.print(_summary(status, language))


def _cells(replica: Replica, language: Language, now_s: float) -> tuple[str, ...]:
    degraded = replica.degraded
    name = replica.replica.rpartition("#")[2]
    if degraded is None:
        return (replica.model, name, replica.state, replica.rung, "", "", "")
    return (
        replica.model,
        name,
        f"▼ {replica.state}, {say(language, 'degraded')}",
        replica.rung,
        degraded.price,
        _time(degraded.since),
        _next_climb(replica, language, now_s),
    )


def _next_climb(replica: Replica, language: Language, now_s: float) -> str:
    degraded = replica.degraded
    assert degraded is not None
    at_s = degraded.next_climb_at
    if at_s is None:
        told = say(language, "unknown")
    elif at_s <= now_s:
        told = say(language, "soon")
    else:
        told = say(language, "in_minutes", minutes=math.ceil((at_s - now_s) / 60))
    if not degraded.failed_climbs:
        return told
    return say(language, "failed_climbs", next=told, number=degraded.failed_climbs)


def _time(at_s: float) -> str:
    """Of this machine's clock; what is no time is shown as it came."""
    try:
        return datetime.fromtimestamp(at_s).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):
        return str(at_s)


def _summary(status: Status, language: Language) -> str:
    number = len(status.replicas)
    if status.is_well:
        return say(language, "all_well", number=number)
    return say(
        language,
        "not_well",
        number=number,
        degraded=_count(status, lambda replica: replica.degraded is not None),
        down=_count(status, lambda replica: replica.state != State.READY),
    )


def _count(status: Status, which: Callable[[Replica], bool]) -> int:
    return sum(map(which, status.replicas))
