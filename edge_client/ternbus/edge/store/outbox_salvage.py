"""What can still be read of a damaged outbox, put into a new one, with the privacy account or not at all."""

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import numpy as np

from ternbus.broker import files
from ternbus.broker.errors import CorruptError, FederationError
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.schema import type_f32
from ternbus.edge.core.state import State
from ternbus.edge.plan.privacy import Account
from ternbus.edge.store.outbox import FILE, Outbox, read_outstanding, summary
from ternbus.edge.store.outbox_format import open_for_reading

READ_ERRORS: Final = (sqlite3.Error, UnicodeError, FederationError, ValueError, TypeError, KeyError)
NUMBERS: Final = ("head_version", "head_seq", "answered_base", "evaluated", "accepted")


def is_sound(folder: Path) -> bool:
    """Whether SQLite can read every page of the outbox, and all of the state is in it."""
    try:
        summary(folder)
        with closing(open_for_reading(folder / FILE)) as db:
            return bool(db.execute("PRAGMA integrity_check").fetchall() == [("ok",)])
    except READ_ERRORS:
        return False


def salvage(folder: Path, key: KeyId, *, private: bool) -> tuple[Path, list[str]]:
    """Replace a damaged outbox by what can be read of it; where the old one is kept, and what is lost.

    Counters begin anew, so the key must be a new one. CorruptError, with the file as it was, where the privacy account
    of a device that has one is lost: it would spend its budget again.
    """
    path = folder / FILE
    lost: list[str] = []
    kept = dict(_rows(path, "SELECT name, value FROM kept", "name", lost))
    if "account" not in kept and (private or kept.get("protected", "unknown")):
        raise CorruptError(
            f"{path} is damaged, and what the device has spent of its privacy budget is lost: leave the federation "
            "and join it anew with a new invitation: ternbus edge rejoin"
        )
    state = _state(path, key, kept, lost)
    counters = dict(_rows(path, "SELECT name, value FROM counters", "name", lost))
    aside = folder / f"outbox-damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    aside.mkdir(mode=0o700)
    for each in folder.glob(f"{FILE}*"):
        each.rename(aside / each.name)
    files.sync(aside)
    with Outbox(folder, key) as outbox:
        outbox.save(state, None, counters)
    return aside, [*lost, "the receipts of earlier updates"]


def _state(path: Path, key: KeyId, kept: dict[str, Any], lost: list[str]) -> State:
    numbers = {}
    for name in NUMBERS:
        try:
            numbers[name] = int(kept[name])
        except (KeyError, ValueError, TypeError):
            lost.append(name)
    residual = _read(path, "the residual", lost, lambda db: db.execute("SELECT vector FROM residual").fetchone())
    outstanding = _read(path, "the update that has no answer", lost, read_outstanding)
    return State(
        key=key,
        enrolled=True,
        schema=bytes(kept.get("schema", b"")),
        head_digest=bytes(kept.get("head_digest", b"")),
        protected=str(kept.get("protected", "")),
        account=Account.loads(kept["account"]) if "account" in kept else Account(),
        residual=np.frombuffer(residual[0], dtype=type_f32).astype(np.float32) if residual else None,
        outstanding=outstanding,
        **numbers,
    )


def _read(path: Path, what: str, lost: list[str], read: Callable[[sqlite3.Connection], Any]) -> Any:
    try:
        with closing(_connect(path)) as db:
            return read(db)
    except READ_ERRORS:
        lost.append(what)
        return None


def _rows(path: Path, query: str, order: str, lost: list[str]) -> list[tuple[str, Any]]:
    """From the first row to the damage, and from the last one back to it."""
    found: dict[str, Any] = {}
    for direction in ("ASC", "DESC"):
        try:
            with closing(_connect(path)) as db:
                rows = db.execute(f"{query} ORDER BY {order} {direction}")
                while (row := rows.fetchone()) is not None:
                    found[row[0]] = row[1]
            return list(found.items())
        except READ_ERRORS as error:
            lost.append(f"perhaps some of: {query.rpartition(' ')[2]} ({error})")
    return list(found.items())


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None)
