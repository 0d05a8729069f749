"""The result of an experiment: the measures of all combinations and seeds, and the goals."""

from collections.abc import Mapping, Sequence
from typing import Any

from ternbus.broker.protocol.direction import ACCURACY
from ternbus.lab.experiment.experiment import Experiment
from ternbus.lab.experiment.measures import METRIC, OF_FLEET, measure
from ternbus.lab.experiment.runner import Run


def _primary(reports: Sequence[Mapping[str, Any]]) -> str:
    """The measure of the primary metric of the runs; the accuracy if none was evaluated."""
    metric = next((report["metric"] for report in reports if report["metric"] is not None), ACCURACY)
    return metric if metric == ACCURACY else METRIC + metric


def collect(experiment: Experiment, runs: Sequence[Run], reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The result as JSON: for each combination its labels and the values of each measure by seed; and the goals."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    measured = [measure(report, experiment.last, experiment.updates, experiment.reach) for report in reports]
    wanted = {*experiment.columns, *experiment.y, *(goal.measure for goal in experiment.goals)}
    names = {
        name: None
        for values in measured
        for name in values
        if name in wanted or (not experiment.columns and name not in OF_FLEET)
    }
    for run, values in zip(runs, measured, strict=True):
        labels = run.combination.labels
        empty: dict[str, list[float | None]] = {name: [] for name in names}
        row = rows.setdefault(tuple(labels.values()), {"labels": dict(labels), "measures": empty})
        for name in names:
            row["measures"][name].append(values.get(name))  # a run may lack a metric, as one that is not finite
    return {
        "title": experiment.title,
        "about": experiment.about,
        "seeds": len({run.seed for run in runs}),
        "last": experiment.last,
        "updates": experiment.updates,
        "x": experiment.x,
        "y": list(experiment.y) or [_primary(reports)],
        "rows": list(rows.values()),
        "goals": [goal.judge(rows.values()) for goal in experiment.goals],
    }
