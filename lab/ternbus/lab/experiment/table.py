"""The table of an experiment's result, in Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ternbus.lab.experiment.measures import named, of_seeds, ordered


def table(result: Mapping[str, Any]) -> str:
    """A table with a row for each combination, measures as mean ± standard deviation over seeds; then the goals."""
    rows = result["rows"]
    axes = list(rows[0]["labels"])
    names = dict.fromkeys(name for row in rows for name in row["measures"] if of_seeds(row, name))
    columns = ordered(names)
    lines = [_row([*axes, *(named(name).title for name in columns)]), _row(["---"] * (len(axes) + len(columns)))]
    for row in rows:
        labels = list(row["labels"].values())
        labels += [""] * (len(axes) - len(labels))  # a run outside the grid has one label only
        lines.append(_row([*labels, *(_cell(name, of_seeds(row, name)) for name in columns)]))
    return "\n".join([*lines, *(f"\n{_verdict(goal)}" for goal in result["goals"])])


def _verdict(goal: Mapping[str, Any]) -> str:
    found = "nothing" if goal["found"] is None else f"{goal['found']:.4g}"
    of = f" ({', '.join(goal['of'].values())})" if goal["of"] else ""
    of += f" less that of {', '.join(than.values())}" if (than := goal.get("than")) else ""
    return f"Goal: {goal['measure']}{of} {goal['goal']}: {'met' if goal['met'] else 'MISSED'}, {found}."


def _cell(name: str, values: Sequence[float]) -> str:
    """The mean of the values in the measure's unit; empty without values."""
    if not values:
        return ""
    mean = statistics.mean(values)
    match named(name).unit:
        case "number":
            return f"{mean:,.0f}"
        case "decimal":
            return f"{mean:.2f}"
        case "value":
            return f"{mean:.4g}{f' ± {statistics.stdev(values):.2g}' if len(values) > 1 else ''}"
        case "percent":
            spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 and name.startswith("acc") else ""
            return f"{100 * mean:.1f} %{spread}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
