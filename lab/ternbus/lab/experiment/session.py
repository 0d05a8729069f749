"""Run an experiment and write the files of its result."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ternbus.broker.errors import ConfigError
from ternbus.broker.files import fault, write_text
from ternbus.broker.version import software
from ternbus.edge.learn.task_loader import load_task
from ternbus.lab.experiment import experiment, plot, result, runner
from ternbus.lab.experiment.experiment import Experiment
from ternbus.lab.experiment.table import table
from ternbus.lab.report import machine
from ternbus.lab.scenario import plan_check, scenario


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The user's options for an experiment.

    ``seeds`` overrides the experiment's own number. ``out`` has a folder for each experiment, and ``keep``, if given,
    a copy of each result.
    """

    data: Path | None
    seeds: int | None
    jobs: int
    out: Path
    keep: Path | None
    fresh: bool = False  # use no finished runs


def run(wanted: Experiment, choices: Choices, check: Callable[[], None], say: Callable[[str], None]) -> dict[str, Any]:
    """Run an experiment, write JSON, table and plot, and return the JSON. ``check`` is as for `runner.run_all`.

    Raises `ConfigError` before the first run for a plan that devices would refuse.
    """
    _check_plans(wanted)
    folder = choices.out / wanted.name
    _make(folder)
    if choices.keep is not None:
        _make(choices.keep)
    runs = runner.plan(wanted.grid, seeds=choices.seeds or wanted.seeds, data=choices.data, folder=folder)
    reports = runner.run_all(runs, jobs=choices.jobs, check=check, say=say, fresh=choices.fresh)
    kept = {
        "command": _command(wanted, choices),
        "seconds": round(sum(report["wall_seconds"] for report in reports)),
        "machine": machine.describe(),
        "made_by": {"software": software(), "tasks": sorted({run.made_by["task"] for run in runs})},  # digests of code
        "result": result.collect(wanted, runs, reports),
    }
    plotted = _write(kept, folder / "result")
    write_text(folder / "table.md", table(kept["result"]) + "\n")
    if choices.keep is not None:
        _write(kept, choices.keep / wanted.name)
    say(f"written to {folder}: table.md, result.json, {plotted}")
    return kept


def _check_plans(wanted: Experiment) -> None:
    load = functools.cache(load_task)
    for combination in wanted.grid.combinations():
        try:
            each = scenario.parse(combination.scenario)
            plan_check.settings(each, load(each.task))
        except ConfigError as error:
            raise ConfigError(f"{combination.title}: {error}") from error


def _command(wanted: Experiment, choices: Choices) -> str:
    """The command that makes the result, without the names of folders."""
    name = wanted.name if wanted.name in experiment.names() else f"{wanted.name}.toml"
    data = " --data DIR" if choices.data is not None else ""
    seeds = f" --seeds {choices.seeds}" if choices.seeds is not None else ""
    own = " --scenario FILE.toml" if wanted.replaced else ""
    return f"ternbus lab experiment {name}{own}{data}{seeds}"


def _make(folder: Path) -> None:
    """Make a folder before hours of simulation, so that an error appears at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise fault(error, folder, f"cannot write to {folder}; give another folder: ") from error


def _write(kept: dict[str, Any], stem: Path) -> str:
    """Write JSON and plot; return the message of `plot.write`."""
    write_text(stem.with_name(f"{stem.name}.json"), json.dumps(kept, indent=1) + "\n")
    return plot.write(kept["result"], stem.with_name(f"{stem.name}.png"))
