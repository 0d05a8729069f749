"""How an experiment's result looks: a table for people, and a plot."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

MEASURES: Final[Mapping[str, tuple[str, str]]] = {
    "accuracy": ("test accuracy", "percent"),
    "accuracy_at_updates": ("accuracy at equal updates", "percent"),
    "stale": ("updates too stale", "percent"),
    "versions": ("versions", "number"),
    "updates": ("updates", "number"),
    "most_updates": ("of one device, at most", "number"),
    "epsilon": ("epsilon of a device, at most", "decimal"),
    "up_share": ("bytes up, of float32", "percent"),
    "both_share": ("both ways", "percent"),
    "megabytes": ("MB in all", "number"),
    "seconds": ("seconds a run", "number"),
}


def mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is: a mean of the others would flatter."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None


def table(result: Mapping[str, Any]) -> str:
    """In Markdown: a row a combination, its measures as mean ± standard deviation of the seeds; then the goals."""
    rows = result["rows"]
    axes = list(rows[0]["labels"])
    columns = [name for name in MEASURES if any(mean(_of(row, name)) is not None for row in rows)]
    lines = [_row([*axes, *(MEASURES[name][0] for name in columns)]), _row(["---"] * (len(axes) + len(columns)))]
    for row in rows:
        labels = list(row["labels"].values())
        labels += [""] * (len(axes) - len(labels))  # a run beside the grid has one label only
        lines.append(_row([*labels, *(_cell(name, _of(row, name)) for name in columns)]))
    for goal in result["goals"]:
        found = "nothing" if goal["found"] is None else f"{goal['found']:.4g}"
        of = f" ({', '.join(goal['of'].values())})" if goal["of"] else ""
        of += f" less that of {', '.join(than.values())}" if (than := goal.get("than")) else ""
        verdict = "met" if goal["met"] else "MISSED"
        lines.append(f"\nGoal: {goal['measure']}{of} {goal['goal']}: {verdict}, {found}.")
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """A panel a measure, an axis of the experiment along x, a line for each combination of the others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # slow, and an extra
    from matplotlib.figure import Figure  # noqa: PLC0415  # likewise

    figure = Figure(figsize=(5 * len(result["y"]), 4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = [row for row in result["rows"] if result["x"] in row["labels"]]
    places = list(dict.fromkeys(row["labels"][result["x"]] for row in grid))
    lines: dict[str, list[Any]] = {}
    for row in grid:
        others = [label for axis, label in row["labels"].items() if axis != result["x"]]
        lines.setdefault(", ".join(others), []).append(row)
    for axes, name in zip(figure.subplots(1, len(result["y"]), squeeze=False)[0], result["y"], strict=True):
        title, unit = MEASURES[name]
        factor = 100 if unit == "percent" else 1
        for shift, (label, rows) in enumerate(lines.items()):
            known = [(row, row["measures"][name]) for row in rows if mean(row["measures"][name]) is not None]
            where = [places.index(row["labels"][result["x"]]) + 0.04 * (shift - len(lines) / 2) for row, _ in known]
            means = [factor * statistics.mean(values) for _, values in known]
            spread = [factor * statistics.pstdev(values) for _, values in known]
            axes.errorbar(where, means, yerr=spread, marker="o", capsize=3, label=label)
        axes.set_xticks(range(len(places)), places)
        axes.set(xlabel=result["x"], ylabel=f"{title}, %" if unit == "percent" else title)
        axes.grid(visible=True, alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize="small")
    figure.suptitle(result["title"])
    figure.savefig(path, dpi=90)


def _cell(name: str, values: Sequence[float | None]) -> str:
    known = mean(values)
    if known is None:
        return ""
    spread = statistics.stdev(value for value in values if value is not None) if len(values) > 1 else 0.0
    if MEASURES[name][1] == "number":
        return f"{known:,.0f}"
    if MEASURES[name][1] == "decimal":
        return f"{known:.2f}"
    return f"{100 * known:.1f} %" + (f" ± {100 * spread:.1f}" if len(values) > 1 and name.startswith("acc") else "")


def _of(row: Mapping[str, Any], name: str) -> Sequence[float | None]:
    """Nothing where the result is older than the measure."""
    found: Sequence[float | None] = row["measures"].get(name, ())
    return found


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
