"""The plot of an experiment's result."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ternbus.lab.experiment.measures import named, of_seeds


def write(result: Mapping[str, Any], path: Path) -> str:
    """Plot a panel for each measure, with one axis of the experiment as x and a line for each combination of others.

    Returns the name of the file, or without matplotlib a message instead.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow, and an extra
        from matplotlib.figure import Figure  # noqa: PLC0415 - likewise
    except ImportError:
        return f"but no {path.name}: matplotlib is missing; run: pip install matplotlib"
    figure = Figure(figsize=(5 * len(result["y"]), 4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = [row for row in result["rows"] if result["x"] in row["labels"]]
    places = list(dict.fromkeys(row["labels"][result["x"]] for row in grid))
    lines: dict[str, list[Any]] = {}
    for row in grid:
        others = [label for axis, label in row["labels"].items() if axis != result["x"]]
        lines.setdefault(", ".join(others), []).append(row)
    for axes, name in zip(figure.subplots(1, len(result["y"]), squeeze=False)[0], result["y"], strict=True):
        measure = named(name)
        factor = 100 if measure.unit == "percent" else 1
        for shift, (label, rows) in enumerate(lines.items()):
            known = [(row, values) for row in rows if (values := of_seeds(row, name))]
            where = [places.index(row["labels"][result["x"]]) + 0.04 * (shift - len(lines) / 2) for row, _ in known]
            means = [factor * statistics.mean(values) for _, values in known]
            spread = [factor * statistics.pstdev(values) for _, values in known]
            axes.errorbar(where, means, yerr=spread, marker="o", capsize=3, label=label)
        axes.set_xticks(range(len(places)), places)
        axes.set(xlabel=result["x"], ylabel=f"{measure.title}, %" if measure.unit == "percent" else measure.title)
        axes.grid(visible=True, alpha=0.3)
        if len(lines) > 1:
            axes.legend(loc="best", fontsize="small")
    figure.suptitle(result["title"])
    figure.savefig(path, dpi=90)
    return path.name
