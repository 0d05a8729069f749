"""What a scenario leaves to the data: the default partition and the number of devices, and who is left over."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from ternbus.broker.errors import ConfigError
from ternbus.broker.plural import counted
from ternbus.edge.learn.draws import SAMPLES_MIN
from ternbus.edge.learn.labels import Labels
from ternbus.edge.learn.partition import Rows, watched
from ternbus.edge.learn.partition_spec import Partition, PartitionError
from ternbus.edge.learn.task import Task
from ternbus.lab.scenario import partitions
from ternbus.lab.scenario.partitions import AUTO, DEVICES_OF_DATA, UNEQUAL
from ternbus.lab.scenario.scenario import DEVICES_MAX, Scenario

NAMES_MAX: Final = 5  # owners that a line names


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A scenario whose partition and devices are known; `lines` say what was chosen and who is left over.

    `rows` are the training data, or None if the task does not choose its rows by `ternbus.edge.select`.
    """

    scenario: Scenario
    rows: Rows | None = None
    lines: Sequence[str] = ()


def settled(scenario: Scenario, task: Task) -> Resolved:
    """The scenario, resolved; the data are read only if they decide."""
    decided = scenario.partition != AUTO and not partitions.by_label(scenario.partition)
    return Resolved(scenario=scenario) if decided else resolved(scenario, task)


def resolved(scenario: Scenario, task: Task) -> Resolved:
    """The scenario, resolved by its data.

    Raises `ConfigError`, which names the scenario's keys, if the data cannot be divided so.
    """
    rows = look(task, scenario.data)
    lines: list[str] = []
    if scenario.partition == AUTO:
        scenario = replace(scenario, partition=_default(scenario, task, rows, lines))
    with partitions.in_scenario_words(scenario.partition):
        if rows is not None and partitions.by_label(scenario.partition):
            scenario = replace(scenario, devices=_owners(scenario, _labels(scenario, rows), lines))
        if scenario.devices == DEVICES_OF_DATA:
            raise partitions.refusal(
                scenario.partition, f"the task {task.name} does not say who owns which sample: set devices"
            )
        if rows is not None:
            lines += remarks(scenario, rows)
    return Resolved(scenario=scenario, rows=rows, lines=lines)


def remarks(scenario: Scenario, rows: Rows) -> list[str]:
    """What a user has to know of how these rows are divided: devices that drew too few, and samples of many devices.

    Raises `ConfigError` if they cannot be divided so.
    """
    found = rows.division(Partition.parse(scenario.partition_of(0)))
    what, lines = f'partition = "{scenario.partition}"', []
    copied = found.copies * rows.samples
    if found.copies > 1:
        lines.append(
            f"{what}: {rows.samples} samples are too few for {scenario.devices} devices: each draws about "
            f"{copied / scenario.devices:.0f} by the seed, and a sample is at about {found.copies} devices"
        )
    if found.filled:
        least = min(SAMPLES_MIN, copied // scenario.devices)
        lines.append(
            f"{what}: {found.filled} of {scenario.devices} devices drew too few samples, and got some of the largest "
            f"part: up to {least}"
        )
    return lines


def look(task: Task, data: Path | None) -> Rows | None:
    """The training data that the task divides; None if it does not choose its rows by `select`."""
    with watched() as seen:
        task.trainer(data=data, partition="all")
    return seen[0] if seen else None


def _default(scenario: Scenario, task: Task, rows: Rows | None, lines: list[str]) -> str:
    if rows is None:
        try:
            task.trainer(data=scenario.data, partition=scenario.partition_of(0))
        except PartitionError as error:  # the task divides its data itself, and says how it can
            if "iid" not in error.kinds:
                raise
            lines.append(f'partition = "iid": {error.problem}')
            return "iid"
    if rows is None or rows.classes is not None:
        return UNEQUAL
    other = f'; "{UNEQUAL}" divides them by quantiles of the target' if rows.bins is not None else ""
    lines.append(f'partition = "iid": the data have no classes, so samples are divided at random{other}')
    return "iid"


def _labels(scenario: Scenario, rows: Rows) -> Labels:
    return rows.labels_of(Partition.parse(scenario.partition_of(0)))


def _owners(scenario: Scenario, found: Labels, lines: list[str]) -> int:
    """The number of devices where each has the rows of one owner, or of one value of a column."""
    what = "owners" if scenario.partition == "natural" else "values"
    count, devices = len(found.values), scenario.devices
    numbers: Any = found.numbers if scenario.partition == "natural" else np.arange(count)
    if devices == DEVICES_OF_DATA:
        devices = min(count, DEVICES_MAX)
        lines.append(f"devices = {devices}: as many as the data have {what}")
    if devices > count:
        raise ConfigError(
            f'devices = {devices}, but partition = "{scenario.partition}" has {count} {what}: use devices = {count} or '
            "fewer, or leave it out"
        )
    if len(gaps := np.setdiff1d(np.arange(devices), numbers)):
        raise partitions.refusal(
            scenario.partition,
            f"owner {gaps[0]} has no samples: number the owners 0 to {count - 1} without gaps, or name them by texts",
        )
    if devices < count:
        names = [str(name) for name in found.values[devices : devices + NAMES_MAX]]
        names += ["…"] if count - devices > NAMES_MAX else []
        left = int(found.counts[devices:].sum())
        beyond = f"{count - devices} of {count} {what} are beyond {counted(devices, 'device')}"
        lines.append(
            f'partition = "{scenario.partition}": {beyond} ({", ".join(names)}): '
            f"nobody trains on their {left} of {found.counts.sum()} samples"
        )
    return devices
