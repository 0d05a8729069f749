"""`ternbus lab …`: run a scenario, show it, and leave its report."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from broker.errors import ConfigError, FederationError
from lab import output, progress, report, scenario
from lab.interrupts import Interrupted, Interrupts
from lab.scenario import Scenario
from lab.supervisor import ChildError
from lab.testbed import Testbed

app = typer.Typer(no_args_is_help=True, help="A whole federation on this machine, and its report.")

EXIT_FAILED: Final = 1
EXAMPLE: Final = Path(__file__).with_name("example.toml")


@app.callback()
def _options() -> None:
    """Without a callback typer would make a lone command the whole program."""


@app.command()
def run(
    file: Annotated[
        Path | None, typer.Argument(metavar="SCENARIO.toml", help="What to run; `ternbus lab example` prints one.")
    ] = None,
    *,
    devices: Annotated[int | None, typer.Option(help="How many devices.  [default: 8]")] = None,
    task: Annotated[str | None, typer.Option(help="A task's name, or MODULE:ATTRIBUTE.  [default: digits]")] = None,
    versions: Annotated[int | None, typer.Option(help="End after so many versions.  [default: 60]")] = None,
    engine: Annotated[str | None, typer.Option(help="The broker: auto, mosquitto or nats.  [default: auto]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of model, partition and speeds.  [default: 0]")] = None,
    data: Annotated[Path | None, typer.Option(help="The task's data, where it brings none itself.")] = None,
    sync: Annotated[bool, typer.Option("--sync", help="With a barrier: each version waits for all devices.")] = False,
    out: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("ternbus-lab"),
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json to standard output.")] = False,
) -> None:
    """Run a federation: a broker, an aggregator, devices and an evaluator, each a process of its own.

    Ctrl-C ends them all. Options go before what the scenario says; without one, eight devices of unequal speed learn
    the digits that come with the package.
    """
    given = {"devices": devices, "task": task, "engine": engine, "seed": seed, "data": data, "sync": sync or None}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    wanted = Scenario() if file is None else scenario.load(file)
    if versions is not None:
        changes["end"] = dataclasses.replace(wanted.end, versions=versions)
    wanted = dataclasses.replace(wanted, **changes)
    raise typer.Exit(_run(wanted, out, as_json))


@app.command()
def example() -> None:
    """Print a scenario with every key, its default and its meaning: a file to start from."""
    typer.echo(EXAMPLE.read_text(encoding="utf-8"), nl=False)


def _run(wanted: Scenario, out: Path, as_json: bool) -> int:
    """The exit code."""
    stream = sys.stderr if as_json else sys.stdout
    with Interrupts() as interrupts:
        place = output.claim(out)
        try:
            result = _result(wanted, place, interrupts, progress.to(stream))
            interrupts.check()
        except Interrupted as stopped:
            typer.echo(f"ternbus: {stopped}; every process has ended", err=True)
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
    report.write(result, place.report)
    files = [str(place.report), str(place.model)]
    missing = report.plot(result, place.plot)
    files.insert(1, missing or str(place.plot))
    shown.say(progress.closing_table(result, files))
    return result


def _complain(error: FederationError) -> None:
    if isinstance(error, ChildError):
        for line in error.lines:
            typer.echo(f"  {line}", err=True)
        typer.echo(f"ternbus: {error}; above are the last lines of {error.log}", err=True)
    else:
        typer.echo(f"ternbus: {error}", err=True)
