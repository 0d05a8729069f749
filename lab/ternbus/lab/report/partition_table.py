"""Who has what: the samples, classes and owners of each device of a scenario, as a table, JSON and a picture."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from ternbus.broker.errors import ConfigError
from ternbus.broker.text_table import text_table
from ternbus.edge.learn.labels import Labels
from ternbus.edge.learn.partition import Rows
from ternbus.edge.learn.partition_spec import Partition
from ternbus.edge.learn.task import Task, halves_of, trainers_of, whole_number
from ternbus.lab.scenario.partitions import by_label, in_scenario_words
from ternbus.lab.scenario.resolve import Resolved
from ternbus.lab.scenario.scenario import Scenario

CLASSES_MAX: Final = 12  # columns of the table
COLOURS: Final = 20
NAMED_MAX: Final = 100  # devices of which each has a bar and a name in the picture
SUFFIXES: Final = (".png", ".svg", ".pdf")


def describe(found: Resolved, task: Task) -> dict[str, Any]:
    """The facts, as `ternbus lab partition --json` prints them.

    `by` says what `counts` counts: "class", "quantile", or None if the data have neither. `parts` has a row for each
    device; `train` and `held_out` differ from `samples` and 0 where `local.hold_out` is set. `left_over` is the number
    of samples that nobody has. Raises `ConfigError` if a part is too small.
    """
    scenario, rows = found.scenario, found.rows
    with in_scenario_words(scenario.partition):
        parts = _parts(scenario, task) if rows is None else _parts_of(scenario, rows)
        division = None if rows is None else rows.division(Partition.parse(scenario.partition_of(0)))
    sizes = [part["samples"] for part in parts]
    labels = None if rows is None else rows.bins
    everybody_has_all = scenario.partition == "all" or (division is not None and division.copies > 1)
    return {
        "task": scenario.task,
        "partition": scenario.partition,
        "devices": scenario.devices,
        "seed": scenario.seed,
        "by": None if rows is None or labels is None else "quantile" if rows.classes is None else "class",
        "labels": [] if labels is None else _names(labels),
        "parts": parts,
        "samples": {
            "all": None if rows is None else rows.samples,
            "min": min(sizes),
            "median": statistics.median(sizes),
            "max": max(sizes),
        },
        "left_over": None if rows is None else 0 if everybody_has_all else rows.samples - sum(sizes),
        "lines": [*found.lines],
    }


def classes_of(found: Resolved) -> list[dict[str, int]]:
    """The samples of each class, for each device in order; empty if the data have no classes, or nobody can tell."""
    rows = found.rows
    if rows is None or rows.classes is None:
        return []
    names = _names(rows.classes)
    parts = _parts_of(found.scenario, rows)
    return [{name: count for name, count in zip(names, part["counts"], strict=True) if count} for part in parts]


def _parts(scenario: Scenario, task: Task) -> list[dict[str, Any]]:
    """The parts by their trainers, of a task that does not say what it divides."""
    parts, share = [scenario.partition_of(index) for index in range(scenario.devices)], scenario.local.hold_out
    if not share:
        sizes = [(whole_number(trainer.samples), 0) for trainer in trainers_of(task, scenario.data, parts)]
    else:
        sizes = [
            (whole_number(one.samples), whole_number(held.samples))
            for one, held in halves_of(task, scenario.data, parts, share)
        ]
    return [_part(index, *size) for index, size in enumerate(sizes)]


def _parts_of(scenario: Scenario, rows: Rows) -> list[dict[str, Any]]:
    labels, share = rows.bins, scenario.local.hold_out
    owners = rows.labels_of(Partition.parse(scenario.partition_of(0))) if by_label(scenario.partition) else None
    parts = []
    for index in range(scenario.devices):
        spec = scenario.partition_of(index)
        chosen = rows.of(spec)
        held = len(rows.of(f"{spec};test:{share!r}")) if share else 0
        part = _part(index, len(chosen) - held, held)
        if labels is not None:
            part["counts"] = np.bincount(labels.codes[chosen], minlength=len(labels.values)).tolist()
        if owners is not None:
            part["owner"] = str(owners.values[owners.codes[chosen[0]]])
        parts.append(part)
    return parts


def _part(index: int, train: int, held: int) -> dict[str, Any]:
    return {"device": f"device-{index}", "samples": train + held, "train": train, "held_out": held}


def _names(labels: Labels) -> list[str]:
    return [str(value) for value in labels.values]


def table(facts: Mapping[str, Any]) -> str:
    """The facts as text: a row for each device, then the sizes and what else is to be said."""
    parts, labels = facts["parts"], facts["labels"]
    few = 0 < len(labels) <= CLASSES_MAX
    columns = {"device": "<"} | ({"owner": "<"} if "owner" in parts[0] else {}) | {"samples": ">"}
    columns |= {"train": ">", "held out": ">"} if any(part["held_out"] for part in parts) else {}
    fixed = [*columns]
    headings = [_heading(label, fixed) for label in labels] if few else ["classes", "largest"] if labels else []
    columns |= dict.fromkeys(headings, ">")
    lines = text_table(columns, [_row(part, fixed, labels, few=few) for part in parts])
    sizes = facts["samples"]
    total = "" if sizes["all"] is None else f" of {sizes['all']}"
    lines += ["", f"samples per device: min {sizes['min']}, median {sizes['median']:g}, max {sizes['max']}{total}"]
    if facts["left_over"]:
        lines.append(f"samples that no device has: {facts['left_over']}")
    return "\n".join([*lines, *facts["lines"]])


def _heading(label: str, taken: list[str]) -> str:
    return f"'{label}'" if label in taken else label


def _row(part: Mapping[str, Any], fixed: list[str], labels: list[str], *, few: bool) -> list[object]:
    cells = [part[name.replace(" ", "_")] for name in fixed]
    if not labels:
        return cells
    counts = part["counts"]
    if few:
        return [*cells, *(count or "." for count in counts)]
    largest = int(np.argmax(counts))
    return [*cells, sum(count > 0 for count in counts), f"{labels[largest]}: {counts[largest]}"]


def check_plot(path: Path) -> None:
    """Raise `ConfigError` if no picture can be made, before there is work to lose."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot {path}: the name must end with {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    try:
        import matplotlib as mpl  # noqa: PLC0415, F401 - an extra
    except ImportError:
        raise ConfigError("--plot: matplotlib is missing; run: pip install 'ternbus[lab]'") from None


def plot(facts: Mapping[str, Any], path: Path) -> None:
    """Draw the parts to a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow, and an extra
    from matplotlib.figure import Figure  # noqa: PLC0415 - likewise

    figure = Figure(figsize=(9, height_of(facts)), layout="constrained")
    FigureCanvasAgg(figure)
    draw(facts, figure.subplots())
    figure.savefig(path, dpi=110)


def height_of(facts: Mapping[str, Any]) -> float:
    """The height of the picture, in inches."""
    devices = len(facts["parts"])
    return 1.6 + 0.24 * devices if devices <= NAMED_MAX else 12


def draw(facts: Mapping[str, Any], axes: Any) -> None:
    """Draw a bar for each device, as long as its samples, in a colour for each class."""
    from matplotlib import colormaps  # noqa: PLC0415 - slow, and an extra

    parts, labels = facts["parts"], facts["labels"]
    counts = np.array([part.get("counts", [part["samples"]]) for part in parts]).reshape(len(parts), -1)
    few = counts.shape[1] <= COLOURS
    colours = colormaps["tab20" if few else "viridis"](
        np.arange(counts.shape[1]) if few else np.linspace(0, 1, counts.shape[1])
    )
    edges = np.arange(len(parts) + 1) - 0.5
    ends = np.cumsum(counts, axis=1)
    for number, colour in enumerate(colours):
        # A single shape for each class: thousands of bars would take minutes.
        left, right = (np.append(side, side[-1]) for side in (ends[:, number] - counts[:, number], ends[:, number]))
        axes.fill_betweenx(
            edges, left, right, step="post", color=colour, linewidth=0, label=labels[number] if labels else "samples"
        )
    if len(parts) <= NAMED_MAX:
        axes.hlines(edges, 0, ends[:, -1].max(), color="white", linewidth=1)
        axes.set_yticks(
            range(len(parts)), [part.get("owner", part["device"].removeprefix("device-")) for part in parts]
        )
    axes.set(xlabel="samples", ylabel="device", ylim=(len(parts) - 0.5, -0.5), xlim=(0, None))
    axes.set_title(f'{facts["task"]}, partition = "{facts["partition"]}"')
    if labels and few:
        axes.legend(title=facts["by"], loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
