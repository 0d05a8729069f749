"""The commands `ternbus aggregator log …`: show, verify and export the log of merges."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ternbus.aggregator.shell import log
from ternbus.broker.errors import ConfigError
from ternbus.broker.exit_codes import EXIT_FAILED
from ternbus.broker.plain_help import command_group
from ternbus.broker.plural import counted
from ternbus.broker.protocol.merge_log import Audit, Contribution, Entry, PrivateMember, Signed

app = command_group("Read the log of merges: which updates are in which version, signed and chained.")

Source = Annotated[
    Path, typer.Argument(metavar="DIR|FILE", exists=True, help="Directory of the aggregator, or an exported log.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command()
def verify(
    source: Source,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="HEX", help="Public key of the aggregator, 64 hex digits; for a DIR its own is the default."
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION[:DIGEST]",
            help="Published head that the log must contain; without one, a missing end is not noticed.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every signature and the chain. Name changed, removed and moved entries; exit code 1 if any.

    For a DIR, entries are also compared with the ledger's other tables and with the last published head.

    Example: ternbus aggregator log verify lab.log --key 9f2c… --head 120
    """
    audit = log.verify(source, None if key is None else _hex(key, "--key"), None if head is None else _head(head))
    typer.echo(json.dumps(_facts(audit)) if as_json else _report(audit))
    if audit.faults:
        raise typer.Exit(EXIT_FAILED)


def _hex(text: str, option: str) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != 32:
        raise ConfigError(f"{option}: {text!r} is invalid: give 64 hex digits")
    return value


def _head(text: str) -> tuple[int, bytes | None]:
    version, _, digest = text.partition(":")
    if not version.isdecimal():
        raise ConfigError(f"--head: {text!r} is not VERSION or VERSION:DIGEST, as `ternbus edge status` shows it")
    return int(version), _hex(digest, "--head") if digest else None


def _facts(audit: Audit) -> dict[str, object]:
    version, digest, entry = audit.last if audit.readable else (None, b"", b"")
    return {
        "ok": not audit.faults,
        "faults": audit.faults,
        "federation": audit.federation,
        "entries": audit.entries,
        "updates": audit.updates,
        "bytes": audit.size_bytes,
        "begins": audit.begins if audit.readable else None,
        "version": version,
        "digest": digest.hex(),
        "hash": entry.hex(),
    }


def _report(audit: Audit) -> str:
    if audit.faults:
        return "\n".join([f"the log is not as it was written: {counted(len(audit.faults), 'fault')}", *audit.faults])
    version, digest, entry = audit.last
    each = f", {audit.size_bytes / audit.updates:.0f} an update" if audit.updates else ""
    return (
        f"the log of {audit.federation} is as it was written: {counted(audit.entries, 'entry')}, "
        f"{counted(audit.updates, 'update')}, {audit.size_bytes} bytes{each}\n"
        f"{_beginning(audit)}it ends with version {version}, digest {digest.hex()}\n"
        f"the last entry's hash, which stands for all of it: {entry.hex()}"
    )


def _beginning(audit: Audit) -> str:
    if audit.begins == 0:
        return ""
    return f"it begins with version {audit.begins}: the aggregator kept no log before, and signed that\n"


@app.command()
def show(
    source: Source,
    device: Annotated[str | None, typer.Option(help="Device whose updates are shown. [default: all]")] = None,
    number: Annotated[
        int | None, typer.Option("--version", min=0, max=2**63 - 1, help="Version that is shown. [default: all]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one entry per line.")] = False,
) -> None:
    """Show the updates of each version: device, sequence number, weight, digest. Nothing is verified.

    Example: ternbus aggregator log show agg --device pi-7
    """
    found = False
    for entry, signed in log.entries(source, number):
        shown = entry if device is None else _of_device(entry, device)
        if device is not None and not (shown.updates or shown.sets or shown.dropped):
            continue
        found = True
        typer.echo(json.dumps(_row(shown, signed)) if as_json else _table(shown, entry.weight))
    if not found:
        whom = "" if device is None else f" of {device}"
        where = "" if number is None else f" in version {number}"
        typer.echo(f"the log has no entry{whom}{where}", err=True)
        raise typer.Exit(EXIT_FAILED)


def _of_device(entry: Entry, device: str) -> Entry:
    """The entry with the updates of one device only."""
    sets = [
        replace(each, members=tuple(member for member in each.members if member.device == device))
        for each in entry.sets
    ]
    return replace(
        entry,
        updates=tuple(each for each in entry.updates if each.device == device),
        sets=tuple(each for each in sets if each.members),
        dropped=tuple(each for each in entry.dropped if each.update.device == device),
    )


def _row(entry: Entry, signed: Signed) -> dict[str, object]:
    row: dict[str, object] = {
        "version": entry.version,
        "digest": entry.digest.hex(),
        "previous": entry.previous.hex(),
        "hash": signed.hash.hex(),
        "updates": [{**_member(each), "weight": each.weight} for each in entry.updates],
    }
    if entry.sets or entry.dropped:
        row["sets"] = [
            {
                "set": each.digest.hex(),
                "context": each.context.hex(),
                "base": each.base,
                "weight": each.weight,
                "members": [_member(member) for member in each.members],
            }
            for each in entry.sets
        ]
        row["dropped"] = [{**_member(each.update), "reason": each.reason} for each in entry.dropped]
    return row


def _member(update: Contribution | PrivateMember) -> dict[str, object]:
    return {"device": update.device, "key": update.key.hex(), "seq": update.seq, "digest": update.digest.hex()}


def _table(entry: Entry, total: float) -> str:
    count = sum(1 for _ in entry.named)
    lines = [f"version {entry.version}, digest {entry.digest.hex()}, {counted(count, 'update')}"]
    lines += [
        f"  {_named(each)} weight {each.weight:<12.6g} {_share(each.weight, total)}  {each.digest.hex()}"
        for each in entry.updates
    ]
    for merged in entry.sets:
        weight = f"weight {merged.weight:<12.6g} {_share(merged.weight, total)}"
        lines.append(f"  set {merged.digest.hex()[:16]} on version {merged.base}, {weight}")
        lines += [f"    {_named(each)} {each.digest.hex()}" for each in merged.members]
    for dropped in entry.dropped:
        lines.append(f"  {_named(dropped.update)} dropped: {dropped.reason}")
    return "\n".join(lines)


def _share(weight: float, total: float) -> str:
    return f"{100 * weight / total:>5.1f} %" if total else ""


def _named(update: Contribution | PrivateMember) -> str:
    name = f"{update.device} ({update.key.hex()})"
    return f"{name:<32} seq {update.seq:<8}"


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The aggregator's directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write; it holds no secret.")],
) -> None:
    """Write the log to a file. Anyone who has the aggregator's public key can verify it.

    The file names devices and says when and how much each contributed.

    Example: ternbus aggregator log export agg lab.log
    """
    log.export(directory, out)
    typer.echo(f"{out}: {out.stat().st_size} bytes; check it with: ternbus aggregator log verify {out} --key …")
