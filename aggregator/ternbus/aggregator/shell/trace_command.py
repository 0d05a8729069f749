"""The command `ternbus aggregator trace`: from one update of a device to the version that it is in."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from ternbus.aggregator.shell import administration
from ternbus.aggregator.shell.arguments import AsJson, Dir
from ternbus.aggregator.shell.health_text import moment
from ternbus.aggregator.store import tracing
from ternbus.aggregator.store.ledger import blaming, reading
from ternbus.broker.exit_codes import EXIT_FAILED
from ternbus.broker.plural import counted
from ternbus.broker.protocol.frame import COUNTER_MAX


def trace(
    directory: Dir,
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Name of the device.")],
    seq: Annotated[int, typer.Argument(metavar="SEQ", min=0, max=COUNTER_MAX, help="Number of the update.")],
    as_json: AsJson = False,
) -> None:
    """Show what became of one update: accepted when, on which base, how late, merged into which version; or why not.

    The number is that of the device's log and of `ternbus edge trace`; each key of a device counts anew. Of refused
    updates the last one of a key is kept; the log of the aggregator has others. The exit code is 1 if the number is not
    known under any key.

    Example: ternbus aggregator trace agg pi-7 12
    """
    administration.load_settings(directory)
    with reading(directory) as ledger:
        found = tracing.find(ledger, device, seq)
    if as_json:
        typer.echo(json.dumps({"device": device, "seq": seq, "updates": found}))
    else:
        with blaming(directory):
            typer.echo("\n".join(line for row in found for line in _lines(device, seq, row)))
    if all(row["state"] in {tracing.FORGOTTEN, tracing.UNKNOWN} for row in found):
        raise typer.Exit(EXIT_FAILED)


def _lines(device: str, seq: int, row: Mapping[str, Any]) -> list[str]:
    key = row["key"] if row["key_state"] == "active" else f"{row['key']}, {row['key_state']}"
    lines = [f"update {seq} of {device} (key {key}): {row['state']}"]
    if row["state"] == tracing.UNKNOWN:
        return [f"{lines[0]}; no update with this number has been answered"]
    if row["state"] == tracing.FORGOTTEN:
        return [f"{lines[0]}; it was not accepted: a higher number was answered, and only the last answer is kept"]
    if row["state"] == tracing.REFUSED:
        return [f"{lines[0]}; the answer was {row['outcome']}: {row['reason']}"]
    lines.append(
        f"  accepted {moment(row['accepted_at'])} on version {row['base']}, staleness {row['staleness']}, "
        f"discount {row['discount']:.4g}, {counted(row['samples'], 'sample')}, digest {row['digest']}"
    )
    if row["state"] == tracing.GONE:
        lines.append(f"  in no version: {row['reason']}")
    if row["state"] == tracing.MERGED:
        lines.append(f"  in version {row['version']}, made {moment(row['made_at'])}, digest {row['version_digest']}")
        if "weight" in row:
            whole = f" of the set {row['set'][:16]}" if "set" in row else ""
            share = "" if row["share"] is None else f", {row['share']:.1%} of it"
            lines.append(f"  with weight {row['weight']:.6g}{whole}{share}")
    return lines
