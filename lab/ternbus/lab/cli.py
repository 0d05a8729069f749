"""`ternbus lab …`: run a scenario, show it, and leave its report."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from ternbus.broker.errors import ConfigError, FederationError
from ternbus.edge.learn.loader import expanded, load_task
from ternbus.lab.interrupts import Interrupted, Interrupts
from ternbus.lab.processes.supervisor import ChildError
from ternbus.lab.processes.testbed import Testbed
from ternbus.lab.report import output, progress, report
from ternbus.lab.scenario import scenario
from ternbus.lab.scenario.scenario import Scenario
from ternbus.lab.virtual.simulate import Simulation
from ternbus.lab.virtual.training import Workers

app = typer.Typer(no_args_is_help=True, help="A whole federation on this machine, and its report.")

EXIT_FAILED: Final = 1
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
