"""The result of an experiment: the measures of all combinations and seeds, and the goals."""

from collections.abc import Mapping, Sequence
from typing import Any

from ternbus.lab.experiment.experiment import Experiment
from ternbus.lab.experiment.measures import measure
from ternbus.lab.experiment.runner import Run


def collect(experiment: Experiment, runs: Sequence[Run], reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The result as JSON: for each combination its labels and the values of each measure by seed; and the goals."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for run, report in zip(runs, reports, strict=True):
        labels = run.combination.labels
        row = rows.setdefault(tuple(labels.values()), {"labels": dict(labels), "measures": {}})
        for name, value in measure(report, experiment.last, experiment.updates).items():
            row["measures"].setdefault(name, []).append(value)
    return {
        "title": experiment.title,
        "about": experiment.about,
        "seeds": len({run.seed for run in runs}),
        "last": experiment.last,
        "updates": experiment.updates,
        "x": experiment.x,
        "y": list(experiment.y),
        "rows": list(rows.values()),
        "goals": [goal.judge(rows.values()) for goal in experiment.goals],
    }
