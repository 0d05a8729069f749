"""Restoring a folder from a backup: it goes on with numbers that no device has seen, and keeps all revocations."""

import shutil
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ternbus.aggregator.shell import administration, backup, checking, dashboard_token
from ternbus.aggregator.shell.administration import KEY
from ternbus.aggregator.store import control, membership, revocations, swapping
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.aggregator.store.revocations import Revocation
from ternbus.broker import files
from ternbus.broker.errors import ConfigError, CorruptError, FederationError
from ternbus.broker.files import read_key
from ternbus.broker.folder_owner import act_as_owner
from ternbus.broker.path_errors import quoted
from ternbus.broker.protocol.identity import Identity

KEPT: Final = (  # they belong to the folder, not to its state
    control.LOCK,
    backup.PLACE,
    dashboard_token.FILE,
    dashboard_token.AUDIT,
    dashboard_token.AUDIT_BEFORE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """Where a folder goes on; ``lists`` are the lists of revoked keys that were found, ``revoked`` whom they added."""

    version: int
    aside: Path | None
    lists: tuple[Path, ...]
    revoked: tuple[str, ...]


def restore(
    source: Path, directory: Path, software: str, *, force: bool = False, clock_s: float | None = None
) -> Restored:
    """Put a backup in the place of a folder, which is kept beside; DIR may be missing or damaged.

    Under root, a new folder belongs to the owner of the backup, and this process goes on as the folder's owner.
    ``clock_s`` is the time of day, now by default.
    ConfigError where a process serves it, or where its state is newer and not ``force``; CorruptError where the backup
    is not sound.
    """
    _refuse_other_than_a_backup(source, directory)
    faults = checking.differences(source)
    if faults:
        raise CorruptError(f"{source} is not as it was written: {faults[0]}; use another backup")
    if not directory.exists():
        files.make_folder(directory, 0o700)
        files.give_to_owner_of(source, directory)
    act_as_owner(directory)
    directory = directory.resolve()
    held = files.lock(directory / control.LOCK)
    if held is None:
        raise ConfigError(f"another process serves {directory}; stop it first")
    with held:
        if swapping.settle(directory) and not force:
            raise ConfigError(
                f"an earlier restore or repair of {directory} was cut short, and has been ended now; "
                "add --force to restore once more"
            )
        if not force:
            _refuse_newer(source, directory)
        partial = directory / "restoring.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _copy(source, partial)
            lists, found = _revocations(source, directory, partial)
            revoked = _revoke(partial, found)
            version = administration.restored(partial, software, time.time() if clock_s is None else clock_s)
            faults = list(checking.check(partial).faults)
            if faults:
                raise CorruptError(f"{source} cannot be restored: {faults[0]}; use another backup")
            old = [path for path in directory.iterdir() if _is_state(path) and path.name not in KEPT]
            for name in KEPT:
                (partial / name).unlink(missing_ok=True)
            aside = swapping.swap(partial, directory, old, swapping.REPLACED)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Restored(version=version, aside=aside, lists=lists, revoked=revoked)


def restored(directory: Path, software: str) -> Restored:
    """Take note that a folder was put back by hand, with every list of revoked keys that there is.

    ConfigError where a process serves it.
    """
    administration.load_settings(directory)
    lists, found = _revocations(directory, directory, directory)
    with administration.exclusive(directory):
        pass  # a mistake in it, or a process that serves it, leaves it as it is
    revoked = _revoke(directory, found)
    version = administration.restored(directory, software, time.time())
    return Restored(version=version, aside=None, lists=lists, revoked=revoked)


def _refuse_other_than_a_backup(source: Path, directory: Path) -> None:
    if not source.exists():
        raise ConfigError(f"there is no {source}: give the folder of a backup, such as /backups/FEDERATION-TIME")
    if not (source / backup.MANIFEST).exists():
        raise ConfigError(
            f"{source} is not a backup that `ternbus aggregator backup` made: {backup.MANIFEST} is missing; "
            "a copy made otherwise is put back by hand, and then needs: ternbus aggregator restored "
            f"{quoted(directory)}"
        )
    ours, theirs = directory.resolve(), source.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise ConfigError(f"{source} and {directory} are one folder, or one is in the other; copy the backup elsewhere")


def _refuse_newer(source: Path, directory: Path) -> None:
    """What cannot be read has no state to lose; it is kept beside all the same."""
    if not (directory / LEDGER).exists():
        return
    try:
        newest = [_state(each) for each in (source, directory)]
    except (FederationError, *checking.UNREADABLE):
        return
    (_, theirs), (public, ours) = newest
    if newest[0][0] != public:
        raise ConfigError(f"{directory} holds another aggregator than {source}; add --force to replace it")
    if ours > theirs:
        raise ConfigError(
            f"{directory} is at version {ours[0]}, newer than the backup's {theirs[0]}; "
            "add --force to go back to the backup"
        )


def _state(directory: Path) -> tuple[bytes, tuple[int, int, int]]:
    """The public key; version, sequence number, and accepted updates."""
    public = Identity(read_key(directory / KEY)).public
    with closing(Ledger(directory / LEDGER, read_only=True, untouched=True)) as ledger, ledger.one_moment():
        return public, (ledger.version, int(ledger.fact("seq")), ledger.accepted())


def _copy(source: Path, partial: Path) -> None:
    """Its state and its settings; what migrations, restores and repairs left beside them stays where it is."""
    partial.mkdir(mode=0o700)
    for path in source.iterdir():
        if _is_state(path) and path.name not in {checking.MANIFEST, *KEPT}:
            copied = partial / path.name
            if path.is_dir():
                shutil.copytree(path, copied)
            else:
                shutil.copy2(path, copied)
    for path in partial.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
        files.sync(path)
    files.sync(partial)


def _is_state(path: Path) -> bool:
    left = ("format-", f"{swapping.REPLACED}-", f"{swapping.DAMAGED}-")
    return not path.name.startswith(left) and not path.name.endswith(".partial") and not path.is_symlink()


def _revocations(source: Path, directory: Path, partial: Path) -> tuple[tuple[Path, ...], list[Revocation]]:
    """Every list that there is: in the backup, beside it, in the folder, and what the folder's ledger says."""
    federation = administration.load_settings(partial).federation
    places = [source / revocations.FILE, backup.beside(source.resolve().parent, federation)]
    places.append(directory / revocations.FILE)
    with suppress(ConfigError):  # what names them is damaged; the next backup writes it anew
        places += [backup.beside(out, federation) for out in backup.places(directory)]
    lists = tuple(path for path in dict.fromkeys(path.resolve() for path in places) if path.exists())
    found = [revocation for path in lists for revocation in revocations.read(path).keys.values()]
    try:
        with closing(Ledger(directory / LEDGER, read_only=True, untouched=True)) as ledger:
            found += membership.revocations(ledger.db)
    except (FederationError, *checking.UNREADABLE):
        pass  # it is missing or damaged, which is why there is a backup
    return lists, found


def _revoke(partial: Path, found: list[Revocation]) -> tuple[str, ...]:
    """Make void what the backup does not know to be; the names of these devices."""
    with control.exclusive(partial), closing(Ledger(partial / LEDGER)) as ledger:
        with ledger.transaction():
            lacking = membership.take_revocations(ledger.db, found, time.time())
            known = membership.revocations(ledger.db)
        revocations.add(partial / revocations.FILE, [*known, *found])
    return tuple(sorted({each.device for each in lacking}))
