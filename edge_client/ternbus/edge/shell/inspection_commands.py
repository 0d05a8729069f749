"""The commands of `ternbus edge` that only look at a device, also while it runs: status, trace, verify."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from ternbus.broker.exit_codes import EXIT_FAILED
from ternbus.broker.folder_owner import act_as_owner
from ternbus.broker.protocol.frame import COUNTER_MAX
from ternbus.edge.shell import log_check, update_trace
from ternbus.edge.shell.arguments import Dir
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.shell.printer import shown
from ternbus.edge.shell.service import PERSONAL
from ternbus.edge.store import outbox

SHOWN = 10  # answers to requests for statistics, of all in --json


def status(
    directory: Dir, as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False
) -> None:
    """Show the device's version, its counters and its outstanding update, also while it runs.

    Example: ternbus edge status pi-7 --json
    """
    act_as_owner(directory)
    home = DeviceDirectory(directory)
    settings = home.settings()
    found = outbox.summary(directory)
    state, last = found.state, found.last
    waiting = state.outstanding
    facts = {
        "federation": settings.federation,
        "device": settings.device,
        "key": state.key.hex(),
        "public_key": home.identity().public.hex(),
        "joined": not settings.code,
        "version": state.head_version,
        "digest": state.head_digest.hex(),
        "base": state.answered_base,
        "accepted": state.accepted,
        "evaluated": state.evaluated,
        "epsilon": state.account.epsilon,
        "delta": state.account.delta,
        "hold_out": settings.hold_out or None,
        "width": settings.width or None,
        "processor": settings.processor or None,
        "max_seconds": settings.limits.seconds,
        "max_steps": settings.limits.steps,
        "helpers": None if settings.sums is None else [key.hex() for key in settings.sums.helpers],
        "private_min": None if settings.sums is None else settings.sums.min,
        "private_roster": None if settings.sums is None else settings.sums.roster,
        "private_colluding": None if settings.sums is None else settings.sums.colluding,
        "private_kind": None if settings.sums is None else settings.sums.kind,
        "refusal": state.refusal or None,
        "statistics_per_day": settings.statistics_per_day,
        "statistics": [asdict(each) for each in state.statistics.asked] or None,
        "personal": str(directory / PERSONAL) if (directory / PERSONAL).exists() else None,
        "outstanding": None
        if waiting is None
        else {"seq": waiting.seq, "base": waiting.base, "bytes": len(waiting.body)},
        "clone": "another machine uses this device's key" if found.is_cloned else None,
        "receipt": None if last is None else {"seq": last.seq, "base": last.base, "outcome": last.outcome},
        "counters": dict(sorted(found.counters.items())),
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        for line, each in _lines(name, value):
            typer.echo(f"{line:28} {shown(each)}")


def trace(
    directory: Dir,
    seq: Annotated[int, typer.Argument(metavar="SEQ", min=1, max=COUNTER_MAX, help="Number of the update.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Show what became of one update, by its number: the version that it was trained on, and its receipt.

    Numbers are those of the log: `trained`, `sent`. `ternbus aggregator trace DIR DEVICE SEQ` shows the version that
    the update is in. The exit code is 1 if no update had this number.

    Example: ternbus edge trace pi-7 12
    """
    act_as_owner(directory)
    settings = DeviceDirectory(directory).settings()
    found = update_trace.find(outbox.summary(directory).state, outbox.answers(directory), seq)
    about = {"device": settings.device, "seq": seq, "updates": [each.facts() for each in found]}
    lines = [f"update {seq} of {settings.device} {each.sentence()}" for each in found]
    lines = lines or [f"{settings.device} has no update {seq}: other messages have numbers too"]
    typer.echo(json.dumps(about) if as_json else "\n".join(lines))
    if not found:
        raise typer.Exit(EXIT_FAILED)


def _lines(name: str, value: object) -> Iterator[tuple[str, object]]:
    """What a fact is for people: a line for each counter, and for each of the last answers to statistics."""
    if name == "counters" and isinstance(value, dict):
        yield from value.items()
    elif name == "statistics" and isinstance(value, list):
        for each in value[-SHOWN:]:
            yield (
                name,
                f"{datetime.fromtimestamp(each['at'], UTC):%Y-%m-%d %H:%M:%SZ} {each['kinds']}: {each['outcome']}",
            )
    else:
        yield name, value


def verify(
    directory: Dir,
    log: Annotated[
        Path,
        typer.Argument(metavar="LOG", exists=True, dir_okay=False, help="File from `ternbus aggregator log export`."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Check in the aggregator's log of merges that each accepted update of this device is in exactly one version.

    The log itself is checked first: with the aggregator's key, and against the newest head that this device has seen.
    The exit code is 1 if a check fails.

    Example: ternbus edge verify pi-7 lab.log
    """
    act_as_owner(directory)
    settings = DeviceDirectory(directory).joined()
    found = log_check.check(log, settings, outbox.summary(directory).state, outbox.answers(directory))
    typer.echo(json.dumps(found.facts()) if as_json else found.report(settings.device))
    if found.faults:
        raise typer.Exit(EXIT_FAILED)
