"""The commands `ternbus aggregator backup`, `check`, `restore`, `repair` and `prune`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ternbus.aggregator.shell import administration, checking, repairing, restoring
from ternbus.aggregator.shell import backup as backups
from ternbus.aggregator.shell.arguments import AsJson, Dir, DirAsRoot
from ternbus.broker.exit_codes import EXIT_FAILED
from ternbus.broker.plural import counted
from ternbus.broker.version import software


def add_to(app: typer.Typer) -> None:
    for command in (backup, check, restore, restored, repair, prune):
        app.command()(command)


def backup(
    directory: Dir,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for backups; each gets a folder in it.")],
    keep: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Keep the N newest backups of this aggregator. [default: all]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy DIR to OUT/FEDERATION-TIME, beside a running process, and check the copy.

    A backup holds the aggregator's keys: whoever has it can speak for the aggregator. Revocations are copied as they
    happen, from now on, into OUT and into the folders of earlier backups that DIR/backups.toml names.

    Example: ternbus aggregator backup agg /backups --keep 14
    """
    made = backups.backup(directory, out, keep, software())
    if as_json:
        _print(path=made.path, version=made.version, bytes=made.size_bytes, removed=made.removed, lacks=made.elsewhere)
    else:
        for path in made.removed:
            typer.echo(f"removed {path}")
        typer.echo(f"{made.path}: version {made.version}, {made.size_bytes / 1e6:.1f} MB, checked")
        for path in made.elsewhere:
            typer.echo(f"not in it: {path}, which aggregator.toml names; back it up too")
        typer.echo("it holds the aggregator's keys: keep it as secret as the folder itself")
    for fault in made.faults:
        typer.echo(f"ternbus: {fault}", err=True)


def check(
    directory: Annotated[Path, typer.Argument(metavar="DIR|BACKUP", help="Directory of an aggregator, or a backup.")],
    as_json: AsJson = False,
) -> None:
    """Check every checksum, every file, the log of merges, and that it opens. Exit code 1 if there are faults.

    Nothing in the folder is changed, whether or not a process serves it. `ternbus aggregator repair` goes on from the
    last version that is sound. A fault of the list of revoked keys says itself what to do.

    Example: ternbus aggregator check agg
    """
    found = checking.check(directory)
    faults = [*found.faults, *found.unlisted]
    if as_json:
        facts = {"ok": not faults, "faults": faults, "federation": found.federation}
        counts = {"version": found.version, "updates": found.updates, "log_entries": found.log_entries}
        typer.echo(json.dumps({**facts, **counts}))
    elif faults:
        typer.echo("\n".join([f"{directory} is not as it was written: {counted(len(faults), 'fault')}", *faults]))
    else:
        typer.echo(
            f"{directory} is sound: {found.federation} at version {found.version}, "
            f"{counted(found.updates, 'update')} in {counted(found.log_entries, 'entry')} of the log"
        )
    if faults:
        raise typer.Exit(EXIT_FAILED)


def restore(
    source: Annotated[Path, typer.Argument(metavar="BACKUP", help="Folder that `ternbus aggregator backup` made.")],
    directory: DirAsRoot,
    force: Annotated[bool, typer.Option("--force", help="Replace a DIR with newer state.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put BACKUP in the place of DIR. Versions continue at least 2^32 higher, above all that devices know.

    All lists of revocations that are found are merged: of the backup, beside the backups, in DIR. What was in DIR is
    kept in a folder within it. Devices that joined after the backup are told that they are unknown; they join again.

    Example: ternbus aggregator restore /backups/lab-20260314T031500Z agg
    """
    done = restoring.restore(source, directory, software(), force=force)
    _tell(directory, done, as_json)


def restored(directory: Dir, as_json: AsJson = False) -> None:
    """Mark DIR as put back by hand from a backup, before the next `run`.

    Devices refuse anything older than what they have seen. Versions therefore continue at least 2^32 higher. Lists of
    revocations are merged as `restore` does.

    Example: ternbus aggregator restored agg
    """
    _tell(directory, restoring.restored(directory, software()), as_json)


def _print(**facts: object) -> None:
    """One JSON object; a path is text, and a tuple an array."""
    typer.echo(json.dumps(facts, default=str))


def _tell(directory: Path, done: restoring.Restored, as_json: bool) -> None:
    if as_json:
        _print(version=done.version, aside=done.aside, lists=done.lists, revoked=done.revoked)
        return
    typer.echo(f"{directory} continues at version {done.version}")
    if done.aside is not None:
        typer.echo(f"what was there is kept in {done.aside}")
    for path in done.lists:
        typer.echo(f"revocations were read from {path}")
    if not done.lists:
        typer.echo("no list of revocations was found: revoke again who was revoked after the backup")
    if done.revoked:
        typer.echo(f"revoked after the backup, and again: {', '.join(done.revoked)}")


def repair(directory: Dir, as_json: AsJson = False) -> None:
    """Go on from what is sound in a damaged DIR, and name what is lost. What was there is kept in a folder within it.

    A damaged snapshot is made anew from the one before and the deltas, and nothing is lost. Otherwise the federation
    goes on from the last sound version, numbered at least 2^32 higher, with a new server state.

    Example: ternbus aggregator repair agg
    """
    done = repairing.repair(directory)
    if as_json:
        _print(version=done.version, aside=done.aside, done=done.done, lost=done.lost)
        return
    if done.aside is None:
        typer.echo(f"{directory} is sound at version {done.version}: nothing was changed")
        return
    for text in done.done:
        typer.echo(text)
    for text in done.lost:
        typer.echo(f"lost: {text}")
    if not done.lost:
        typer.echo("nothing is lost")
    typer.echo(f"what was there is kept in {done.aside}")


def prune(
    directory: Dir,
    keep_versions: Annotated[
        int, typer.Option(metavar="N", min=1, help="Newest versions whose rows stay in the ledger.")
    ] = 1000,
    as_json: AsJson = False,
) -> None:
    """Move old rows of the ledger to a file in DIR/archive. Stop the aggregator before.

    Versions, their updates, their entries of the log and their metrics go; what a start needs, what may still be
    exported and what is not stale stays. `log verify`, `log export`, `check`, `backup` and `restore` read archives as
    parts of the ledger. The command may be interrupted at any moment, and run again.

    Example: ternbus aggregator prune agg --keep-versions 1000
    """
    done = administration.prune(directory, keep_versions)
    if as_json:
        typer.echo(json.dumps({"archive": done.path and str(done.path), "before": done.before, "rows": done.rows}))
    elif done.path is None:
        typer.echo(f"{directory} has no rows to archive: those of version {done.before} and later stay")
    else:
        rows = ", ".join(f"{number} of {table}" for table, number in done.rows.items())
        typer.echo(f"{done.path}: all that is older than version {done.before}; rows: {rows}")
