"""What can still be read of a damaged outbox, put into a new one, with the privacy account or not at all."""

import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from ternbus.broker import files
from ternbus.broker.crash_points import reached
from ternbus.broker.errors import CorruptError, FederationError
from ternbus.broker.path_errors import quoted
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.messages import PRIVATE
from ternbus.broker.protocol.schema import Vector, type_f32
from ternbus.broker.store_format import checksum
from ternbus.edge.core.state import OutstandingUpdate, State, Statistics
from ternbus.edge.plan.privacy import Account
from ternbus.edge.store import outbox_format
from ternbus.edge.store.outbox import FILE, Outbox, cards_of, outstanding_of, private_of, statistics_of, summary
from ternbus.edge.store.outbox_format import COLUMNS, open_for_reading

READ_ERRORS: Final = (sqlite3.Error, UnicodeError, FederationError, ValueError, TypeError, KeyError)
FRESH: Final = "outbox-salvaged.partial"
LEAVING: Final = "outbox-damaged.partial"
NUMBERS: Final = ("head_version", "head_seq", "answered_base", "evaluated", "accepted")


def is_sound(folder: Path) -> bool:
    """Whether SQLite can read every page of the outbox, and all of the state is in it."""
    try:
        summary(folder)
        with closing(open_for_reading(folder / FILE)) as db:
            return bool(db.execute("PRAGMA integrity_check").fetchall() == [("ok",)])
    except READ_ERRORS:
        return False


def salvage(folder: Path, key: KeyId, *, private: bool, account_lost: bool = False) -> tuple[Path, list[str]]:
    """Replace a damaged outbox by what can be read of it; where the old one is kept, and what is lost.

    Counters begin anew, so the key must be a new one. CorruptError, with the file as it was, where the privacy account
    of a device that has one is lost: it would spend its budget again. With ``account_lost`` its owner wants that.
    """
    path = folder / FILE
    lost: list[str] = []
    kept = dict(_rows(path, "kept", lost))
    if "account" not in kept and not account_lost and (private or kept.get("protected", "unknown")):
        raise CorruptError(
            f"{path} is damaged, and what the device has spent of its privacy budget is lost: to begin a new "
            f"budget, run `ternbus edge rejoin --account-lost INVITATION.toml {quoted(folder)}`"
        )
    state = _state(path, key, kept, lost)
    counters = dict(_rows(path, "counters", lost))
    fresh, leaving = folder / FRESH, folder / LEAVING
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    with Outbox(fresh, key) as outbox:
        outbox.save(state, None, counters)
    files.sync(fresh)
    leaving.mkdir(mode=0o700, exist_ok=True)
    for name in (FILE, f"{FILE}-wal", f"{FILE}-shm"):
        if (folder / name).exists():
            (folder / name).rename(leaving / name)
    files.sync(leaving)
    files.sync(folder)
    reached("outbox-moved-aside")
    (fresh / FILE).rename(path)
    files.sync(folder)
    reached("outbox-salvaged")
    aside = _keep(folder)
    return aside, [*lost, "the receipts of earlier updates"]


def settle(folder: Path) -> None:
    """Go on where a process was killed in `salvage`: the damaged file is put back, or kept if there is a new one."""
    if not (folder / LEAVING).exists():
        return
    if (folder / FILE).exists():
        _keep(folder)
        return
    for path in (folder / LEAVING).iterdir():
        path.rename(folder / path.name)
    (folder / LEAVING).rmdir()


def _keep(folder: Path) -> Path:
    stamp, number = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()), 1
    while (aside := folder / f"outbox-damaged-{stamp}-{number}").exists():
        number += 1
    (folder / LEAVING).rename(aside)
    shutil.rmtree(folder / FRESH, ignore_errors=True)
    files.sync(folder)
    return aside


def _state(path: Path, key: KeyId, kept: dict[str, Any], lost: list[str]) -> State:
    numbers = {}
    for name in NUMBERS:
        try:
            numbers[name] = int(kept[name])
        except (KeyError, ValueError, TypeError):
            lost.append(name)
    residual = _whole(path, "residual", kept, lost)
    outstanding: OutstandingUpdate | None = _whole(path, "outstanding", kept, lost)
    if outstanding is not None and outstanding.codec == PRIVATE:
        part = _whole(path, "private", kept, lost)
        outstanding = None if part is None else replace(outstanding, private=part)
    return State(
        key=key,
        enrolled=True,
        schema=bytes(kept.get("schema", b"")),
        head_digest=bytes(kept.get("head_digest", b"")),
        protected=str(kept.get("protected", "")),
        local=bytes(kept.get("local", b"")),
        account=Account.loads(kept["account"]) if "account" in kept else Account(),
        residual=residual,
        outstanding=outstanding,
        left=-1 if outstanding is None else outstanding.base,  # whether it was sent may be lost
        cards=cards_of(kept.get("cards", "{}")),
        statistics=statistics_of(kept["statistics"]) if "statistics" in kept else Statistics(),
        refusal="",  # as the next head has it
        **numbers,
    )


def _vector(row: Sequence[Any]) -> Vector:
    return np.frombuffer(row[0], dtype=type_f32).astype(np.float32)


READERS: Final[Mapping[str, tuple[str, Callable[[Sequence[Any]], object]]]] = {
    "residual": ("the residual", _vector),
    "outstanding": ("the update that has no answer", outstanding_of),
    "private": ("the update that has no answer", private_of),
}


def _whole(path: Path, table: str, kept: dict[str, Any], lost: list[str]) -> Any:
    """What is in a table of one row at most, if it is as it was written."""
    try:
        with closing(_connect(path)) as db:
            row = db.execute(f"SELECT {COLUMNS[table]} FROM {table}").fetchone()  # noqa: S608 - our own names
            if _has_checksums(db) and kept.get(table) != ("" if row is None else str(checksum(*row))):
                raise CorruptError(table)
            return None if row is None else READERS[table][1](row)
    except READ_ERRORS:
        lost.append(READERS[table][0])
        return None


def _rows(path: Path, table: str, lost: list[str]) -> list[tuple[str, Any]]:
    """(name, value) of the rows that are as they were written, of those that can be read.

    From the first row to the damage, and from the last one back to it.
    """
    found: dict[str, Any] = {}
    for direction in ("ASC", "DESC"):
        try:
            with closing(_connect(path)) as db:
                rows = outbox_format.rows(db, table, f"ORDER BY name {direction}")
                if not _has_checksums(db):
                    rows = db.execute(f"SELECT name, value, 1 FROM {table} ORDER BY name {direction}")  # noqa: S608 - our own names
                for name, value, is_sound in rows:
                    if is_sound:
                        found[name] = value
                    else:
                        lost.append(f"a row of {table}")
            return list(found.items())
        except READ_ERRORS as error:
            lost.append(f"perhaps some of: {table} ({error})")
    return list(found.items())


def _has_checksums(db: sqlite3.Connection) -> bool:
    return "crc" in {row[1] for row in db.execute("PRAGMA table_info(kept)")}


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None)
