"""The commands `ternbus lab …`: run or simulate a federation, print an example scenario, run experiments."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from ternbus.broker.errors import ConfigError, FederationError
from ternbus.broker.exit_codes import EXIT_FAILED
from ternbus.broker.files import check_readable, expanded
from ternbus.broker.json_output import json_output
from ternbus.broker.plain_help import command_group
from ternbus.edge.learn.failure import explained
from ternbus.edge.learn.partition_spec import listed
from ternbus.edge.learn.task_loader import load_task
from ternbus.lab.experiment import experiment, session, table
from ternbus.lab.experiment.experiment import Experiment
from ternbus.lab.experiment.session import Choices
from ternbus.lab.interrupts import Interrupted, Interrupts
from ternbus.lab.processes.supervisor import ChildError
from ternbus.lab.processes.testbed import Testbed
from ternbus.lab.report import output, partition_table, progress, report, written
from ternbus.lab.scenario import partitions, plan_check, scenario
from ternbus.lab.scenario.resolve import resolved
from ternbus.lab.scenario.scenario import Scenario
from ternbus.lab.virtual import to_files
from ternbus.lab.virtual.computation import Computation

app = command_group("Run a whole federation on this machine and report its results.")

EXAMPLE: Final = Path(__file__).with_name("example.toml")

File = Annotated[
    Path | None, typer.Argument(metavar="SCENARIO.toml", help="Scenario to run; `ternbus lab example` prints one.")
]
Devices = Annotated[
    int | None, typer.Option(help="Number of devices. [default: 8, or one for each owner with natural or by:COLUMN]")
]
TaskName = Annotated[
    str | None, typer.Option("--task", help="Name of the task, or MODULE:ATTRIBUTE. [default: digits]")
]
Versions = Annotated[int | None, typer.Option(help="Number of versions after which the run ends. [default: 60]")]
Seed = Annotated[int | None, typer.Option(help="Seed of the model, the partition and the speeds. [default: 0]")]
Data = Annotated[Path | None, typer.Option(help="Folder with the task's data, if the task needs one.")]
Partition = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help=f"Division of the data: {listed([kind.strip(chr(34)) for kind in partitions.FORMS.values()])}. "
        f"[default: {partitions.UNEQUAL} if the data have classes, else iid]",
    ),
]
Sync = Annotated[bool, typer.Option("--sync", help="Barrier: each version waits for updates of all devices.")]
Out = Annotated[Path, typer.Option(help="Folder for the report, model, logs and all other files.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print report.json to standard output.")]


@app.callback()
def _options() -> None:
    """Keep the commands as subcommands; typer would turn a single command into the whole program."""


@app.command()
def run(
    file: File = None,
    *,
    devices: Devices = None,
    task: TaskName = None,
    versions: Versions = None,
    engine: Annotated[
        str | None, typer.Option(help="Broker software: auto, mosquitto or nats. [default: auto]")
    ] = None,
    seed: Seed = None,
    data: Data = None,
    partition: Partition = None,
    sync: Sync = False,
    out: Out = Path("ternbus-lab"),
    as_json: AsJson = False,
) -> None:
    """Run a federation as real processes: a broker, an aggregator, devices and an evaluator.

    Ctrl-C stops all processes. Options override the scenario.

    Example: ternbus lab run --devices 20 --versions 100
    """
    given = {"devices": devices, "task": task, "engine": engine, "seed": seed, "data": data, "sync": sync or None}
    given["partition"] = partition
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
    partition: Partition = None,
    sync: Sync = False,
    every: Annotated[
        int | None, typer.Option(help="Number of versions from one evaluation to the next. [default: 1]", min=1)
    ] = None,
    jobs: Annotated[
        str, typer.Option(metavar="N|ray://HOST:PORT", help="Processes that train, or a Ray cluster.")
    ] = "1",
    vectorise: Annotated[int, typer.Option(metavar="N", help="Devices that a process trains at once.", min=1)] = 1,
    ledger: Annotated[bool, typer.Option("--ledger", help="Keep the aggregator's ledger in OUT/aggregator.")] = False,
    out: Out = Path("ternbus-lab"),
    as_json: AsJson = False,
) -> None:
    """Simulate a federation in virtual time, with the code of real devices and a simulated network and clock.

    Training is real, but its duration is drawn at random. A simulation of slow devices therefore takes only the time
    of its computations. The same seed gives the same model, bit for bit. The scenario's broker is ignored. --jobs
    spreads training over processors, and is useful if one training takes seconds; --vectorise trains several devices
    of a small model at once, and gives the same model to rounding. With both, each of the processes does so.

    Ctrl-C ends it after the training that is going on. The report is then of the versions until then.

    Example: ternbus lab simulate --devices 20 --versions 100
    """
    given = {"devices": devices, "task": task, "seed": seed, "data": data, "sync": sync or None}
    given["partition"] = partition
    wanted = _wanted(file, given, versions)
    if every is not None:
        wanted = dataclasses.replace(wanted, simulate=dataclasses.replace(wanted.simulate, evaluate_every=every))
    raise typer.Exit(_simulate(wanted, out, as_json, Computation(jobs=jobs, vectorise=vectorise), keep_ledger=ledger))


@app.command("partition")
def show_partition(
    file: File = None,
    *,
    devices: Devices = None,
    task: TaskName = None,
    partition: Partition = None,
    seed: Seed = None,
    data: Data = None,
    hold_out: Annotated[float | None, typer.Option(help="Share of each device's data that it holds out.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Picture to write: FILE.png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Show which device of a scenario has what: its samples, and how many of each class.

    Nothing is trained. A target that is a number with a fraction is counted by its ten quantiles. Below the table are
    the sizes, the samples that no device has, and what the data decided: the default partition, the number of devices.

    `iid`: equal random parts. `dirichlet:ALPHA`: unequal sizes and mixes of classes; small ALPHA = very unequal.
    `quantity:ALPHA`: unequal sizes only. `shards:K`: about K classes for each device. `natural`: the owners in the
    data, such as writers. `by:COLUMN`: the values of a column. `all`: everything for everybody.

    Example: ternbus lab partition --task digits --partition shards:2 --devices 10 --plot parts.png
    """
    if plot is not None:
        partition_table.check_plot(plot)
    given = {"devices": devices, "task": task, "seed": seed, "data": data, "partition": partition}
    wanted = _wanted(file, given, None)
    if hold_out is not None:
        wanted = dataclasses.replace(wanted, local=dataclasses.replace(wanted.local, hold_out=hold_out))
    with json_output(as_json) as own:
        loaded = load_task(wanted.task)
        with explained(wanted.task, lacks_data=wanted.data is None):
            found = resolved(wanted, loaded)
            plan_check.settings(found.scenario, loaded)
            facts = partition_table.describe(found, loaded)
        if plot is not None:
            partition_table.plot(facts, plot)
        own.write((json.dumps(facts) if as_json else partition_table.table(facts)) + "\n")


@app.command()
def example() -> None:
    """Print a scenario with every key, its default and its meaning, as a file to start from.

    Example: ternbus lab example > scenario.toml
    """
    typer.echo(EXAMPLE.read_text(encoding="utf-8"), nl=False)


@app.command("experiment")
def run_experiments(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME|FILE.toml", help="Experiments that come with Ternbus, or files of your own."),
    ] = None,
    *,
    own_scenario: Annotated[
        Path | None,
        typer.Option("--scenario", metavar="FILE.toml", help="Scenario in place of the experiment's, such as yours."),
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with the datasets of the tasks.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds, instead of the experiment's own.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Number of runs at a time. [default: number of processors]")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for runs and results.")] = Path(
        "ternbus-experiments"
    ),
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Second folder for the result, as NAME.json and NAME.png.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run everything anew, whatever is finished.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Run an experiment: simulate every combination of its settings with several seeds.

    Without NAME, list the experiments that come with Ternbus. The result is printed as a table and kept in OUT/NAME,
    with a plot and a folder for each run. To continue an interrupted experiment, repeat the command: it skips finished
    runs whose scenario, task, data and version of Ternbus have not changed. The exit code is 1 if the experiment
    misses a goal.

    Example: ternbus lab experiment staleness --jobs 4
    """
    if not names:
        _list_experiments(as_json)
        return
    raise typer.Exit(
        _run_experiments(
            [experiment.load(name, own_scenario) for name in names],
            Choices(
                data=data and expanded(data),
                seeds=seeds,
                jobs=jobs or os.cpu_count() or 1,
                out=out,
                keep=keep,
                fresh=fresh,
            ),
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
    """Run the experiments, print their results, and return the exit code."""
    met = True
    if choices.data is not None:
        check_readable(choices.data, "--data")
    with Interrupts() as interrupts, json_output(as_json) as own:
        try:
            for each in wanted:
                kept = session.run(each, choices, interrupts.check, lambda line: typer.echo(line, err=True))
                own.write((json.dumps(kept, allow_nan=False) if as_json else table.table(kept["result"])) + "\n")
                own.flush()
                met = met and all(goal["met"] for goal in kept["result"]["goals"])
        except Interrupted as stopped:
            typer.echo(f"ternbus: {stopped}; to continue with the remaining runs, repeat the command", err=True)
            return stopped.exit_code
        except ConfigError:
            raise
        except FederationError as error:
            _complain(error)
            return EXIT_FAILED
    return 0 if met else EXIT_FAILED


def _wanted(file: Path | None, given: Mapping[str, object], versions: int | None) -> Scenario:
    """The scenario in the file, or the default scenario, with the changes of the options."""
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if "data" in changes:
        changes["data"] = expanded(changes["data"])
    own = {"partition": changes["partition"]} if "partition" in changes else {}
    wanted = scenario.parse(own) if file is None else scenario.load(file, own)
    if versions is not None:
        changes["end"] = dataclasses.replace(wanted.end, versions=versions)
    wanted = dataclasses.replace(wanted, **changes)
    if wanted.data is not None:
        check_readable(wanted.data, "data")
    return wanted


def _run(wanted: Scenario, out: Path, as_json: bool) -> int:
    """Run a federation of processes, and return the exit code."""
    return _reported(
        out,
        as_json,
        lambda place, interrupts, shown: _result(wanted, place, interrupts, shown),
        ("all processes have ended", "all processes have ended"),
    )


def _simulate(wanted: Scenario, out: Path, as_json: bool, how: Computation, *, keep_ledger: bool) -> int:
    """Simulate a federation, and return the exit code."""
    return _reported(
        out,
        as_json,
        lambda place, interrupts, shown: to_files.simulate(
            wanted, place, interrupts, shown, how, keep_ledger=keep_ledger
        ),
        ("no report was written", "the report is of the versions until then"),
    )


def _reported(
    out: Path,
    as_json: bool,
    result_of: Callable[[output.Output, Interrupts, progress.Progress], dict[str, Any]],
    after_stop: tuple[str, str],
) -> int:
    """The exit code. ``after_stop`` is what is said of an interrupted run without a report, and of one with it."""
    stream = sys.stderr if as_json else sys.stdout
    with Interrupts() as interrupts, json_output(as_json) as own:
        place = output.claim(out)
        try:
            result = result_of(place, interrupts, progress.to(stream))
        except Interrupted as stopped:
            typer.echo(f"ternbus: {stopped}; {after_stop[0]}", err=True)
            return stopped.exit_code
        except ConfigError:
            raise
        except FederationError as error:
            _complain(error)
            return EXIT_FAILED
        finally:
            place.release()
        if as_json:
            own.write(json.dumps(result, allow_nan=False) + "\n")
        if (came := interrupts.came) is not None:
            typer.echo(f"ternbus: {came}; {after_stop[1]}", err=True)
            return came.exit_code
    return 0


def _result(wanted: Scenario, place: output.Output, interrupts: Interrupts, shown: progress.Progress) -> dict[str, Any]:
    began = time.monotonic()
    with shown, Testbed(wanted, place, interrupts, shown) as testbed:
        testbed.start()
        testbed.watch()
        moment = testbed.finish()
        testbed.export()
        sets = testbed.merged_sets
    result = report.summary(
        moment,
        scenario=testbed.scenario,
        parameters=testbed.parameters,
        wall_seconds=time.monotonic() - began,
        sets=sets,
    )
    written.write(result, place, shown)
    return result


def _complain(error: FederationError) -> None:
    if isinstance(error, ChildError):
        for line in error.lines:
            typer.echo(f"  {line}", err=True)
        typer.echo(f"ternbus: {error}; the lines above are the end of {error.log}", err=True)
    else:
        typer.echo(f"ternbus: {error}", err=True)
