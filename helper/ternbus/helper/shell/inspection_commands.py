"""The commands of `ternbus helper` that look at a helper, also while it runs: status, roster, log."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ternbus.broker.errors import CorruptError, ProtocolError
from ternbus.broker.files import replacing
from ternbus.broker.plural import counted
from ternbus.broker.sums.terms import OWN
from ternbus.broker.text_table import text_table
from ternbus.helper.core.opening_log import Opening, checked
from ternbus.helper.core.records import PREPARED
from ternbus.helper.shell.arguments import AsJson, Dir
from ternbus.helper.shell.directory import HelperDirectory, Settings
from ternbus.helper.store import store as stores
from ternbus.helper.store.store import Summary
from ternbus.helper.store.tables import FILE

DAY_S = 86400.0


def status(directory: Dir, as_json: AsJson = False) -> None:
    """Show who waits for whom: broker, aggregator, sets, the last answer, refusals; also while the helper runs.

    Example: ternbus helper status bureau --json
    """
    home = HelperDirectory(directory)
    settings, found = home.settings(), stores.summary(directory)
    state, now = found.state, time.time()
    facts = {
        "federation": settings.federation,
        "helper": settings.helper,
        "key": home.identity().public.hex(),
        "broker": settings.broker,
        "enrolled": state.enrolled,
        "running": home.is_running,
        "aggregator": found.facts.get("aggregator", "unknown") if home.is_running else "unknown",
        "waits_for": _waits_for(home, settings, found),
        "kind": settings.kind,
        "roster": settings.roster,
        "devices": found.devices,
        "min": settings.min,
        "box_key": state.box_key.number,
        "box_key_days": int(max(0.0, now - state.box_key.made_s) / DAY_S),
        "old_box_keys": len(state.box_keys) - 1,
        "count": state.count,
        "sets": dict(found.sets),
        "last_answer": found.facts.get("answer"),
        "last_answer_s_ago": int(max(0.0, now - found.facts["answered_s"])) if "answered_s" in found.facts else None,
        "counters": dict(found.counters),
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        rows = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        for line, each in rows.items():
            typer.echo(f"{line:28} {_shown(each)}")


def _shown(value: object) -> object:
    """A value in a table for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else value


def _waits_for(home: HelperDirectory, settings: Settings, found: Summary) -> str | None:
    """Who must do what next; None if the helper waits only for the next ask."""
    broker = found.facts.get("broker", "connected")
    prepared = found.sets.get(PREPARED, 0)
    if found.state.is_behind:
        return f"you: run `ternbus helper restored {home.quoted}`, since the database is an older copy"
    if not settings.aggregator_key:
        return f"an invitation: `ternbus aggregator invite AGG --helper {settings.helper}`"
    if not home.is_running:
        return f"you: run `ternbus helper run {home.quoted}`"
    if broker != "connected":
        return f"the broker: {broker}"
    if found.facts.get("aggregator") != "online":
        return "the aggregator, which is not online"
    if not found.state.enrolled:
        return "the aggregator to enroll this helper"
    if settings.roster == OWN and found.devices < settings.min and not prepared:
        few = f"a sum has {settings.min} devices or more, and the roster {found.devices}"
        return f"you: run `ternbus helper admit {home.quoted} NAME KEY` for each device, since {few}"
    return f"the aggregator to open or abandon {counted(prepared, 'prepared set')}" if prepared else None


def roster(
    directory: Dir,
    remove: Annotated[str, typer.Option(metavar="NAME", help="Device to take off the roster.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the devices that this helper knows: their keys, and who admitted them.

    With `--remove` a device's updates are in no set any more that this helper opens. Its keys stay bound to its name.

    Example: ternbus helper roster bureau
    """
    HelperDirectory(directory).settings()
    if remove:
        stores.remove(directory, remove)
    rows: list[dict[str, Any]] = [
        {
            "device": each.device,
            "key": each.public.hex(),
            "active": each.active,
            "admitted_by": each.admitted_by,
            "admitted": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(each.admitted_s)),
        }
        for each in stores.roster(directory)
    ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    cells = [[row["device"], row["key"], row["admitted_by"], row["admitted"]] for row in rows if row["active"]]
    columns = {"device": "<", "key": "<", "admitted by": "<", "since": "<"}
    typer.echo("\n".join(text_table(columns, cells)))


def log(
    directory: Dir,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write, with a JSON object per line, signatures too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every set that was opened: devices, base, digests; each entry is signed and has the hash of the last one.

    Beside the aggregator's log of merges it shows sets that were opened and merged nowhere. The whole log is checked
    first; the exit code is 2 if it is not as it was written.

    Example: ternbus helper log bureau --out bureau.jsonl
    """
    home = HelperDirectory(directory)
    home.settings()
    packed = list(stores.log(directory))
    try:
        entries = list(checked(packed, home.identity().public))
    except ProtocolError as error:
        raise CorruptError(f"the log in {directory / FILE} is not as it was written: {error}") from error
    lines = [json.dumps({**_facts(entry), "signed": each.hex()}) for entry, each in zip(entries, packed, strict=True)]
    if out is not None:
        with replacing(out) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        typer.echo(f"{out}: {counted(len(lines), 'set')}")
    elif as_json:
        for line in lines:
            typer.echo(line)
    else:
        cells = [
            [
                each.number,
                each.base,
                len(each.members),
                each.digest.hex()[:16],
                " ".join(name for name, _ in each.members),
            ]
            for each in entries
        ]
        columns = {"number": ">", "base": ">", "devices": ">", "set": "<", "names": "<"}
        typer.echo("\n".join(text_table(columns, cells)))


def _facts(entry: Opening) -> dict[str, object]:
    return {
        "number": entry.number,
        "count": entry.count,
        "set": entry.digest.hex(),
        "context": entry.context.hex(),
        "base": entry.base,
        "members": {name: digest.hex() for name, digest in entry.members},
        "previous": entry.previous.hex(),
    }
