"""The search in the federation as text, for people."""

from collections.abc import Mapping
from typing import Any

from ternbus.broker.plural import counted
from ternbus.broker.text_table import text_table


def lines(found: Mapping[str, Any]) -> list[str]:
    """What `ternbus aggregator status` says of a search: how far it is, and a row for each arm of each class."""
    steps = found["steps"]
    step = steps[-1]
    judged = counted(len(steps) - 1, "rung")
    about = f"search ({found['method']}): {judged} judged, the newest arms are those of version"
    opening = f"{about} {step['version']}"
    if all(found["done"]):
        opening += "; it has ended: write the best arm into [plan], and leave out [search]"
    if len(steps) == 1 and found["judged"] == 0 and any(map(any, found["updates"])):
        by = f"have judged a version by {found['metric'] or 'loss'}: join devices with --hold-out"
        opening += f"; no two devices with held-out data {by}, of a task with this metric"
    if len(steps) == 1 and found["judged"] is None:
        by = found["metric"] or "the primary metric"
        opening += f"; evaluators judge widths by {by}: there must be one that has it"
    columns = dict.fromkeys(("class", "arm"), "<") | dict.fromkeys(("share", "updates", "effect", "seconds"), ">")
    rows = []
    for place, name in enumerate(found["classes"]):
        weights = step["weights"][place]
        for arm, keys in enumerate(found["arms"]):
            effect = step["effects"][place][arm] if step["effects"] else None
            latency = found["latency_s"][place][arm]
            best = " (best)" if found["best"][place] == arm else ""
            rows.append(
                (
                    f"{name}…" if name else "all" if len(found["classes"]) == 1 else "others",
                    f"{', '.join(f'{key} {value:g}' for key, value in keys.items())}{best}",
                    f"{weights[arm] / sum(weights):.0%}",
                    found["updates"][place][arm],
                    None if effect is None else f"{effect:+.3f}",
                    None if latency is None else f"{latency:.3g}",
                )
            )
    return [opening, *text_table(columns, rows)]
