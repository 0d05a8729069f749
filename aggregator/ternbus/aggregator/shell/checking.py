"""The check of an aggregator's folder or backup for damage; it changes nothing."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ternbus.aggregator.shell import administration, log
from ternbus.aggregator.shell.administration import KEY
from ternbus.aggregator.store import control, membership, revocations, soundness
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.broker import files
from ternbus.broker.errors import ConfigError, CorruptError, ProtocolError
from ternbus.broker.files import load_toml, read_key
from ternbus.broker.plural import counted
from ternbus.broker.protocol.identity import Identity

MANIFEST: Final = "backup.toml"  # in a backup: what it is of, and the digest of each file
UNREADABLE: Final = soundness.UNREADABLE
TRIES: Final = 5  # beside a process that removes what it no longer needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a check found; ``version``, ``updates`` and ``log_entries`` are counts of what was looked at.

    ``unlisted`` are faults of the list of revoked keys. The state is whole without it, so a backup is made all the
    same, and there is nothing for a repair to do.
    """

    faults: tuple[str, ...]
    unlisted: tuple[str, ...] = ()
    federation: str = ""
    version: int = -1
    updates: int = 0
    log_entries: int = 0


def check(directory: Path) -> Checked:
    """Look at everything. ConfigError where there is no aggregator, or one of an older format.

    A running process removes files that its newest version no longer needs, so what is missing beside one is looked
    for again, from a later version on.
    """
    if not (directory / LEDGER).exists() and (made := sorted(directory.glob(f"*/{MANIFEST}"))):
        names = ", ".join(str(path.parent) for path in made)
        raise ConfigError(f"{directory} is no backup, but holds backups; name one of them: {names}")
    for _ in range(TRIES):
        is_running = control.is_running(directory)
        found = _check(directory, is_running=is_running)
        if not found.faults or not (is_running or control.is_running(directory)):
            break
    return found


def _check(directory: Path, *, is_running: bool) -> Checked:
    try:
        administration.load_settings(directory)
        public = Identity(read_key(directory / KEY)).public
    except ConfigError as error:
        if not (directory / LEDGER).exists():
            raise
        return Checked(faults=(str(error),))
    if changed := differences(directory):
        return Checked(faults=tuple(changed))
    try:
        ledger = Ledger(directory / LEDGER, read_only=True, untouched=not is_running)
        with closing(ledger), ledger.one_moment():
            return _look(directory, ledger, public)
    except soundness.UNREADABLE as error:
        return Checked(faults=(str(error),))


def differences(directory: Path) -> list[str]:
    """Where the files of a backup are not those that its manifest names; none of a folder without a manifest."""
    return list(_differences(directory)) if (directory / MANIFEST).exists() else []


def _differences(backup: Path) -> Iterator[str]:
    try:
        named = dict(load_toml(backup / MANIFEST)["files"])
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        yield f"{backup / MANIFEST} cannot be read: {error}"
        return
    for name, expected in named.items():
        try:
            found = files.digest(backup / name).hex()
        except OSError as error:
            yield f"cannot read {backup / name}: {error.strerror}"
            continue
        if found != expected:
            yield f"{backup / name} is not as it was written"


def _look(directory: Path, ledger: Ledger, public: bytes) -> Checked:
    faults = list(soundness.faults(ledger, public))
    if not faults:
        audit = log.verify_ledger(ledger, public, None)
        faults += audit.faults
    if faults:
        return Checked(faults=tuple(faults))
    try:
        administration.open_core(directory, ledger, "check")
    except (ConfigError, CorruptError, ProtocolError) as error:
        faults.append(str(error))
    return Checked(
        faults=tuple(faults),
        unlisted=tuple(_unlisted(directory, ledger)),
        federation=str(ledger.fact("federation")),
        version=ledger.version,
        updates=audit.updates,
        log_entries=audit.entries,
    )


def _unlisted(directory: Path, ledger: Ledger) -> Iterator[str]:
    """What the list of revoked keys lacks: it is what keeps them revoked where the ledger is an older copy."""
    path = directory / revocations.FILE
    found = revocations.read(path)
    known = membership.revocations(ledger.db)
    if lacking := [each.device for each in known if (each.device, each.public) not in found.keys]:
        names = ", ".join(sorted(set(lacking)))
        yield f"{path} lacks {counted(len(lacking), 'key')} that the ledger has revoked, of {names}: a start adds them"
    if found.damaged:
        yield (
            f"{path}: {counted(len(found.damaged), 'line')} cannot be read, beginning with {found.damaged[0][:40]!r}; "
            "remove such lines, and revoke again each device that they named: a list beside a backup may have the name"
        )
