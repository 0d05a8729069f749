"""`ternbus lab …`: run a scenario, show it, and leave its report."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from ternbus.broker.errors import ConfigError, FederationError
from ternbus.broker.exit_codes import EXIT_FAILED
from ternbus.edge.learn.loader import expanded, load_task
from ternbus.lab.experiment import experiment, session, table
from ternbus.lab.experiment.experiment import Experiment
from ternbus.lab.experiment.session import Choices
from ternbus.lab.interrupts import Interrupted, Interrupts
from ternbus.lab.processes.supervisor import ChildError
from ternbus.lab.processes.testbed import Testbed
from ternbus.lab.report import output, progress, report
from ternbus.lab.scenario import scenario
from ternbus.lab.scenario.scenario import Scenario
from ternbus.lab.virtual.simulate import Simulation
from ternbus.lab.virtual.training import Workers

app = typer.Typer(no_args_is_help=True, help="A whole federation on this machine, and its report.")

EXAMPLE: Final = Path(__file__).with_name("example.toml")

File = Annotated[
    Path | None, typer.Argument(metavar="SCENARIO.toml", help="What to run; `ternbus lab example` prints one.")
]
Devices = Annotated[int | None, typer.Option(help="How many devices.", show_default="8")]
TaskName = Annotated[
    str | None, typer.Option("--task", help="A task's name, or MODULE:ATTRIBUTE.", show_default="digits")
]
Versions = Annotated[int | None, typer.Option(help="End after so many versions.", show_default="60")]
Seed = Annotated[int | None, typer.Option(help="Of model, partition and speeds.", show_default="0")]
Data = Annotated[Path | None, typer.Option(help="The task's data, where it brings none itself.")]
Sync = Annotated[bool, typer.Option("--sync", help="With a barrier: each version waits for all devices.")]
Out = Annotated[Path, typer.Option(help="Where everything is written.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print report.json to standard output.")]


@app.callback()
def _options() -> None:
    """Without a callback typer would make a lone command the whole program."""


@app.command()
def run(
    file: File = None,
    *,
    devices: Devices = None,
    task: TaskName = None,
    versions: Versions = None,
    engine: Annotated[
        str | None, typer.Option(help="The broker: auto, mosquitto or nats.", show_default="auto")
    ] = None,
    seed: Seed = None,
    data: Data = None,
    sync: Sync = False,
    out: Out = Path("ternbus-lab"),
    as_json: AsJson = False,
) -> None:
    """Run a federation: a broker, an aggregator, devices and an evaluator, each a process of its own.

    Ctrl-C ends them all. What an option says counts more than what the scenario says.

    Example: ternbus lab run --devices 20 --versions 100
    """
    given = {"devices": devices, "task": task, "engine": engine, "seed": seed, "data": data, "sync": sync or None}
    raise typer.Exit(_run(_wanted(file, given, versions), out, as_json))


@app.command()
def simulate(
    file: File = None,
    *,
    devices: Devices = None,
    task: TaskName = None,
    versions: Versions = None,
    seed: Seed = None,
    data: Data = None,
    sync: Sync = False,
    every: Annotated[int | None, typer.Option(help="Evaluate each so many versions.", show_default="1", min=1)] = None,
    jobs: Annotated[int, typer.Option(help="How many processes train at a time: the model is the same.", min=1)] = 1,
    ledger: Annotated[bool, typer.Option("--ledger", help="Keep the aggregator's ledger, in OUT/aggregator.")] = False,
    out: Out = Path("ternbus-lab"),
    as_json: AsJson = False,
) -> None:
    """Run a federation in virtual time: the same code for all but network and clock.

    Training is real, its seconds are not: they are drawn. So a slow federation takes no longer than its arithmetic,
    and the same seed gives the same model, bit for bit. Which broker the scenario names plays no part. --jobs spreads
    the training over processors, which pays where a training takes seconds.

    Example: ternbus lab simulate --devices 20 --versions 100
    """
    given = {"devices": devices, "task": task, "seed": seed, "data": data, "sync": sync or None}
    wanted = _wanted(file, given, versions)
    if every is not None:
        wanted = dataclasses.replace(wanted, simulate=dataclasses.replace(wanted.simulate, evaluate_every=every))
    raise typer.Exit(_simulate(wanted, out, as_json, jobs=jobs, keep_ledger=ledger))


@app.command()
def example() -> None:
    """Print a scenario with every key, its default and its meaning: a file to start from."""
    typer.echo(EXAMPLE.read_text(encoding="utf-8"), nl=False)


@app.command("experiment")
def run_experiments(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME|FILE.toml", help="Experiments of Ternbus, or files of your own."),
    ] = None,
    *,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with the datasets of the tasks.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds, in place of the experiment's own.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Number of runs at a time.", show_default="number of processors")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for runs and results.")] = Path(
        "ternbus-experiments"
    ),
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Second folder for the result, as NAME.json and NAME.png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result, or the list, as JSON.")] = False,
) -> None:
    """Run an experiment: every combination of its settings, with several seeds, in virtual time.

    Without a NAME, list the experiments that come with Ternbus. The result is printed as a table, and is in OUT/NAME
    with a plot and a folder for each run. The same command continues an interrupted experiment: a run is repeated
    only if its scenario has changed. The exit code is 1 if the experiment misses one of its goals.

    Example: ternbus lab experiment staleness --jobs 4
    """
    if not names:
        _list_experiments(as_json)
        return
    raise typer.Exit(
        _run_experiments(
            [experiment.load(name) for name in names],
            Choices(data=data, seeds=seeds, jobs=jobs or os.cpu_count() or 1, out=out, keep=keep),
            as_json,
        )
    )


def _list_experiments(as_json: bool) -> None:
    found = [experiment.load(name) for name in experiment.names()]
    if as_json:
        rows = [{"name": each.name, "title": each.title, "about": " ".join(each.about.split())} for each in found]
        typer.echo(json.dumps(rows))
        return
    width = max(len(each.name) for each in found)
    for each in found:
        typer.echo(f"{each.name:<{width}}  {each.title}")


def _run_experiments(wanted: Sequence[Experiment], choices: Choices, as_json: bool) -> int:
    """The exit code."""
    met = True
    with Interrupts() as interrupts:
        try:
            for each in wanted:
                kept = session.run(each, choices, interrupts.check, lambda line: typer.echo(line, err=True))
                typer.echo(json.dumps(kept, allow_nan=False) if as_json else table.table(kept["result"]))
                met = met and all(goal["met"] for goal in kept["result"]["goals"])
        except Interrupted as stopped:
            typer.echo(f"ternbus: {stopped}; the same command continues with the runs that are not done", err=True)
            return stopped.exit_code
        except ConfigError:
            raise
        except FederationError as error:
            _complain(error)
            return EXIT_FAILED
    return 0 if met else EXIT_FAILED


def _wanted(file: Path | None, given: Mapping[str, object], versions: int | None) -> Scenario:
    """The scenario in the file, or the one without a file, and over it what the options say."""
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if "data" in changes:
        changes["data"] = expanded(changes["data"])
    wanted = Scenario() if file is None else scenario.load(file)
    if versions is not None:
        changes["end"] = dataclasses.replace(wanted.end, versions=versions)
    return dataclasses.replace(wanted, **changes)


def _run(wanted: Scenario, out: Path, as_json: bool) -> int:
    """The exit code."""
    return _reported(
        out,
        as_json,
        lambda place, interrupts, shown: _result(wanted, place, interrupts, shown),
        "every process has ended",
    )


def _simulate(wanted: Scenario, out: Path, as_json: bool, *, jobs: int, keep_ledger: bool) -> int:
    """The same in virtual time."""
    return _reported(
        out,
        as_json,
        lambda place, interrupts, shown: _simulated(wanted, place, interrupts, shown, jobs, keep_ledger=keep_ledger),
        "nothing was kept",
    )


def _reported(
    out: Path,
    as_json: bool,
    result_of: Callable[[output.Output, Interrupts, progress.Progress], dict[str, Any]],
    stopped_says: str,
) -> int:
    stream = sys.stderr if as_json else sys.stdout
    with Interrupts() as interrupts:
        place = output.claim(out)
        try:
            result = result_of(place, interrupts, progress.to(stream))
            interrupts.check()
        except Interrupted as stopped:
            typer.echo(f"ternbus: {stopped}; {stopped_says}", err=True)
            return stopped.exit_code
        except ConfigError:
            raise
        except FederationError as error:
            _complain(error)
            return EXIT_FAILED
        finally:
            place.release()
    if as_json:
        typer.echo(json.dumps(result, allow_nan=False))
    return 0


def _result(wanted: Scenario, place: output.Output, interrupts: Interrupts, shown: progress.Progress) -> dict[str, Any]:
    began = time.monotonic()
    with shown, Testbed(wanted, place, interrupts, shown) as testbed:
        testbed.start()
        testbed.watch()
        moment = testbed.finish()
        testbed.export()
    result = report.summary(
        moment, scenario=wanted, parameters=testbed.parameters, wall_seconds=time.monotonic() - began
    )
    _write(result, place, shown)
    return result


def _simulated(
    wanted: Scenario,
    place: output.Output,
    interrupts: Interrupts,
    shown: progress.Progress,
    jobs: int,
    *,
    keep_ledger: bool,
) -> dict[str, Any]:
    began = time.monotonic()
    with shown:
        shown.say(f"{wanted.task}: {wanted.devices} devices in virtual time")
        folder = place.aggregator if keep_ledger else None
        with (
            Workers(wanted, jobs) if jobs > 1 else nullcontext() as workers,
            closing(Simulation(wanted, load_task(wanted.task), shown, folder, workers)) as simulation,
        ):
            simulation.run(interrupts.check)
            simulation.export(place.model)
            result = simulation.report(time.monotonic() - began)
    _write(result, place, shown)
    return result


def _write(result: Mapping[str, Any], place: output.Output, shown: progress.Progress) -> None:
    report.write(result, place.report)
    missing = report.plot(result, place.plot)
    shown.say(progress.closing_table(result, [str(place.report), missing or str(place.plot), str(place.model)]))


def _complain(error: FederationError) -> None:
    if isinstance(error, ChildError):
        for line in error.lines:
            typer.echo(f"  {line}", err=True)
        typer.echo(f"ternbus: {error}; above are the last lines of {error.log}", err=True)
    else:
        typer.echo(f"ternbus: {error}", err=True)
