"""What `ballast plan` says, in English and in Chinese. Knows no layout."""

from cluster.languages import Language, Phrase

PHRASES: dict[str, Phrase] = {
    "where": Phrase("where", "位置"),
    "why": Phrase("why there", "选择理由"),
    "settings": Phrase("settings", "参数"),
    "memory": Phrase("memory", "显存"),
    "pins": Phrase("as pins", "固定写法"),
    "notes": Phrase("notes", "说明"),
    "rejected": Phrase("rejected", "未采用"),
    "smaller": Phrase("next smaller card", "更小一档显卡"),
    "ladder": Phrase("ladder", "降级阶梯"),
    "floor": Phrase("floor", "下限"),
    "card_of": Phrase("{node}, card {cards}", "{node}，显卡 {cards}"),
    "share_of": Phrase("{node}, {share} of card {cards}", "{node}，显卡 {cards} 的 {share}"),
    "ram_of": Phrase("{node}, {size} of RAM", "{node}，内存 {size}"),
    "one_card": Phrase("{card}", "{card}"),
    "several_cards": Phrase("{number} x {card}", "{number} x {card}"),
    "with_stages": Phrase(
        "{number} x {card} ({stages} stages of {group})",
        "{number} x {card}（{stages} 个流水段，每段 {group} 张）",
    ),
    "with_share": Phrase("{share} of one {card}", "一张 {card} 的 {share}"),
    "objective_throughput": Phrase(
        "throughput: the fewest cards, then the card with the most room and bandwidth",
        "吞吐优先：卡数最少，其次容量与带宽最大的卡",
    ),
    "objective_latency": Phrase(
        "latency: the smallest of the options within 15 % of the fastest step",
        "延迟优先：在最快单步的 15 % 之内取占用最小者",
    ),
    "objective_cheapest": Phrase(
        "cheapest: the least card memory that holds what is asked for",
        "成本优先：满足要求的最小显存占用",
    ),
    "on_cpu": Phrase("the CPU, as the config says", "按配置在 CPU 上运行"),
    "tightest": Phrase(
        "of {number} nodes with room, the fullest", "{number} 个节点可容纳，取最满的一个"
    ),
    "only_node": Phrase("the only node with room", "唯一可容纳的节点"),
    "spread": Phrase(
        "stages over several nodes: no single one has room for all",
        "流水段跨节点：没有单个节点能全部容纳",
    ),
    "passed_over": Phrase(
        "{what}: better, and too few were left beside the other models",
        "{what}：更优，但与其他模型并存时余量不足",
    ),
    "not_taken": Phrase("{what}: it would fit too, and comes after", "{what}：也可运行，排序靠后"),
    "cramped": Phrase(
        "{what}: it would fit with {tokens} tokens of context only",
        "{what}：仅能容纳 {tokens} tokens 上下文",
    ),
    "too_small": Phrase(
        "{what}: needs {needed} per GPU, {available} available",
        "{what}：每张 GPU 需要 {needed}，可用 {available}",
    ),
    "no_share": Phrase(
        "{what}: needs {needed} per GPU, {available} available; no share holds it",
        "{what}：每张 GPU 需要 {needed}，可用 {available}，没有合适的百分比份额",
    ),
    "impossible": Phrase("{what}: {problem}", "{what}：{problem}"),
    "nothing_rejected": Phrase(
        "nothing: the config leaves no other card or split", "没有：配置未留其他显卡或切分方式"
    ),
    "full_nodes": Phrase("{number} x node: {reason}", "{number} 个节点：{reason}"),
    "smaller_costs": Phrase("on {what}: {changes}", "在 {what} 上：{changes}"),
    "smaller_same": Phrase("on {what}: the same settings", "在 {what} 上：参数不变"),
    "smaller_refused": Phrase("on {what}: it does not fit", "在 {what} 上：无法运行"),
    "no_smaller": Phrase("none is known", "没有已知的更小显卡"),
    "skipped": Phrase("skipped: {reason}", "跳过：{reason}"),
    "floor_share": Phrase(
        "{needed} per GPU; gpu_memory_utilization {share} for one request of {tokens} tokens",
        "每张 GPU {needed}；gpu_memory_utilization {share}，可容纳一个 {tokens} tokens 的请求",
    ),
    "floor_bytes": Phrase(
        "{needed} per GPU for one request of {tokens} tokens",
        "每张 GPU {needed}，可容纳一个 {tokens} tokens 的请求",
    ),
    "under_load": Phrase(
        "{used} of {total} per GPU under load; {tokens} tokens of KV cache",
        "负载下每张 GPU {used} / {total}；KV 缓存 {tokens} tokens",
    ),
    "replicas": Phrase("replica {number}", "副本 {number}"),
    "unplaced": Phrase("no place: {problem}", "无法放置：{problem}"),
    "does_not_fit": Phrase(
        "{asked}: needs {needed} per GPU, {available} available. {would_fit}",
        "{asked}：每张 GPU 需要 {needed}，可用 {available}。请调整 {setting}。（{would_fit}）",
    ),
    "no_room": Phrase(
        "{problem}",
        "至少需要 {what}，与其他模型并存时余量不足：请增加显卡、减少 num_replicas，"
        "或用 objective: cheapest 让小模型共用显卡",
    ),
    "summary": Phrase(
        "{placed} of {asked} replicas placed on {cards} of {total} GPUs.",
        "{asked} 个副本中放置了 {placed} 个，使用 {total} 张 GPU 中的 {cards} 张。",
    ),
    "summary_cpu": Phrase(
        "{placed} of {asked} replicas placed.", "{asked} 个副本中放置了 {placed} 个。"
    ),
}


def say(language: Language, key: str, **values: object) -> str:
    """The phrase with its values; a key without one is a mistake of ours."""
    return getattr(PHRASES[key], language.value).format(**values)
