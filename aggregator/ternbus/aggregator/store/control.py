"""Requests of commands to an aggregator: the running process performs them; without one, the command does."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

from ternbus.aggregator.core import events
from ternbus.aggregator.store import checksums, membership, migration, private_rows, recovery, revocations, tags
from ternbus.aggregator.store.ledger import LEDGER, Ledger, writing
from ternbus.broker import files
from ternbus.broker.crash_points import reached
from ternbus.broker.errors import ConfigError, FederationError
from ternbus.broker.model_files import load_safetensors
from ternbus.broker.protocol.merge_log import OTHER_MODEL
from ternbus.broker.protocol.messages import CLOSED, OPEN, PAUSED
from ternbus.broker.protocol.schema import to_vector
from ternbus.broker.store_format import naming

LOCK: Final = "lock"
POLL_S: Final = 0.02
WAIT_S: Final = 20.0

PAUSE, RESUME, CLOSE = "pause", "resume", "close"
STATES: Final = {PAUSE: PAUSED, RESUME: OPEN, CLOSE: CLOSED}
INVITATIONS: Final = "invitations"  # the open invitations changed
COUNTS: Final = "counts"  # counters are to be on disk
CANCEL: Final = "cancel"  # a device's invitation
REVOKE: Final = "revoke"  # a device; the argument is JSON
STATISTICS: Final = "statistics"  # of devices' data; the argument is JSON
ROLLBACK: Final = "rollback"  # to a version, or to the model of a file; the argument is JSON


class NotRunningError(FederationError):
    """No process serves this directory."""


def event(ledger: Ledger, what: str, argument: str, request: int = 0) -> events.Event:
    """A request as the core is told of it. Every record of before must be in the ledger."""
    if what == CANCEL:
        return events.CancelRequested(device=argument, request=request)
    if what == REVOKE:
        buffer = recovery.Waiting(ledger, ledger.schema())
        return events.RevokeRequested(**json.loads(argument), buffer=buffer, request=request)
    if what == ROLLBACK:
        return _rollback(ledger, json.loads(argument), request)
    if what == STATISTICS:
        table: dict[str, Any] = {name: _tupled(value) for name, value in json.loads(argument).items()}
        return events.StatisticsRequested(**table, request=request)
    if what == INVITATIONS:
        return events.InvitationsRead(
            codes=membership.codes(ledger.db), helpers=private_rows.codes(ledger.db), request=request
        )
    if what == COUNTS:
        return events.CountsRequested(request=request)
    return events.StateRequested(state=STATES[what], request=request)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _rollback(ledger: Ledger, asked: Mapping[str, Any], request: int) -> events.RollbackRequested:
    """The model that is asked for: of a kept version, or of a file in the directory."""
    to = asked.get("version", OTHER_MODEL)
    try:
        if to != OTHER_MODEL:
            return events.RollbackRequested(to=to, vector=tags.vector_of(ledger, to), request=request)
        vector = to_vector(ledger.schema(), load_safetensors(ledger.path.parent / asked["file"]))
        return events.RollbackRequested(to=to, vector=vector, request=request)
    except FederationError as error:
        return events.RollbackRequested(to=to, error=str(error), request=request)


@contextmanager
def exclusive(directory: Path, *, patience_s: float = 0.0) -> Iterator[None]:
    """Be the one process that serves this directory, and migrate its ledger where it has an older format.

    ConfigError where another process still serves it after ``patience_s``.
    """
    with files.storing(directory / LOCK):
        held = files.lock(directory / LOCK, patience_s=patience_s)
    if held is None:
        raise ConfigError(f"another process serves {directory}; stop it first")
    with held:
        migration.migrate(directory / LEDGER)
        if (directory / LEDGER).exists():
            _settle_revocations(directory)
        yield


def _settle_revocations(directory: Path) -> None:
    """Have the list of revoked keys and the ledger know the same: either may be an older copy, or lack the last one."""
    listed = revocations.read(directory / revocations.FILE).keys
    with closing(Ledger(directory / LEDGER)) as ledger, naming(ledger.path):
        known = {(each.device, each.public): each for each in membership.revocations(ledger.db)}
        if known.keys() - listed.keys():
            revocations.add(directory / revocations.FILE, known.values())
        if lacking := [each for key, each in listed.items() if key not in known]:
            with ledger.transaction():
                membership.take_revocations(ledger.db, lacking, time.time())


def is_running(directory: Path) -> bool:
    """Whether a process serves this directory now. It looks with a shared lock, which is why ``run`` has patience."""
    return files.is_locked(directory / LOCK)


def ask(directory: Path, what: str, argument: str = "") -> None:
    """Have the running aggregator do something, and return when it is done and on disk; NotRunningError otherwise."""
    if not is_running(directory):
        raise NotRunningError(f"no aggregator runs on {directory}")
    with writing(directory) as ledger:
        with ledger.transaction():
            (number,) = ledger.db.execute("SELECT coalesce(max(id), 0) + 1 FROM requests").fetchone()
            checksums.insert(ledger.db, "requests", (number, what, argument, 0, ""))
        reached("requested")
        _wait(ledger, directory, number)


def _wait(ledger: Ledger, directory: Path, request: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        row = ledger.db.execute("SELECT done, error FROM requests WHERE id = ?", (request,)).fetchone()
        if row is not None and row[0]:
            if row[1]:
                raise ConfigError(row[1])
            return
        if not is_running(directory):
            _withdraw(ledger, request)
            raise NotRunningError(f"the aggregator on {directory} stopped before it answered")
        time.sleep(POLL_S)
    _withdraw(ledger, request)
    raise FederationError(f"the aggregator on {directory} did not answer within {WAIT_S:.0f} s; look at its log")


def _withdraw(ledger: Ledger, request: int) -> None:
    """Or it would be done later, whatever was asked for in between."""
    with ledger.transaction():
        ledger.db.execute("DELETE FROM requests WHERE id = ?", (request,))
