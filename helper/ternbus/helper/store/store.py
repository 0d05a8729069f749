"""The helper's durable state and records; each save is one transaction on stable storage.

Unlike a device's outbox, this file must never be restored from a backup: an old copy does not know which sets were
opened since. `ternbus helper restored` is for a helper that has lost it.
"""

import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, assert_never

from ternbus.broker import store_format
from ternbus.broker.crash_points import reached
from ternbus.broker.errors import ConfigError
from ternbus.broker.path_errors import quoted
from ternbus.broker.sums.terms import AGGREGATOR, OWN
from ternbus.helper.core.actions import Note
from ternbus.helper.core.records import ABANDONED, OPENED, PREPARED, Abandoned, Opened, Prepared, Step
from ternbus.helper.core.state import BoxKey, State
from ternbus.helper.store.tables import ASIDE, FILE, insert, naming, open_for_reading, open_for_writing, remedy

_VALUES: Final = tuple(each.name for each in fields(State) if each.name != "box_keys")  # one row of `kept` for each
_NUMBERS: Final = tuple(name for name in _VALUES if name not in {"enrolled", "log_hash"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A key on the roster; one that is not active was replaced, or its device was removed."""

    device: str
    public: bytes
    active: bool
    admitted_by: str
    admitted_s: float


class HelperStore:
    """The store of one helper: the state, and `Records`. SQL stays here."""

    def __init__(self, folder: Path, roster: str) -> None:
        """Open the file, or make one. The caller holds the directory's lock.

        With a roster of the helper's own, keys that the aggregator put on it before are forgotten. Raises
        `ConfigError` for a newer format, and `CorruptError` if the file is not as it was written.
        """
        self._path = folder / FILE
        self._roster = roster
        self._is_to_be_erased = False  # an erased box key may still be in the write-ahead log
        opened = store_format.opening(self._path, partial(open_for_writing, self._path), remedy(self._path))
        with opened as self._db, naming(self._path):
            if roster == OWN:
                _forget_the_aggregators(self._db)
            self.state = _state(self._db)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    # -- writing

    def save(self, state: State, step: Step | None = None) -> None:
        """Save the state and the step in one transaction. Only changed values are written.

        An erased box key is in no file then: with a new one, damaged databases that were kept are removed, too.
        """
        before = self.state
        with naming(self._path), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for name in _VALUES:
                if before is None or getattr(state, name) != getattr(before, name):
                    insert(self._db, "kept", (name, _stored(getattr(state, name))))
            gone = {} if before is None else {key.number: key for key in before.box_keys}
            for key in state.box_keys:
                if gone.pop(key.number, None) != key:
                    insert(self._db, "box_keys", (key.number, key.secret, key.made_s, key.retired_s))
            for number in gone:
                self._db.execute("DELETE FROM box_keys WHERE number = ?", (number,))
            if step is not None:
                self._write(step)
            reached("state-written")
        self.state = state
        self._is_to_be_erased |= bool(gone)
        if self._is_to_be_erased and step is None:
            with naming(self._path):  # an erased key is in the write-ahead log too, and a reader may keep it there
                is_busy, *_ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._is_to_be_erased = bool(is_busy)
        if before is not None and before.box_key.number < state.box_key.number:
            for aside in self._path.parent.glob(f"{ASIDE}*"):
                shutil.rmtree(aside, ignore_errors=True)

    def _write(self, step: Step) -> None:
        match step:
            case Prepared():
                size = len(step.members)
                row = (step.digest, PREPARED, step.count, size, step.base, step.context, step.unix_s)
                insert(self._db, "sets", row)
                for device, public in step.members:
                    insert(self._db, "used", (device, step.base, step.digest))
                    if self._roster == AGGREGATOR and self.key_of(device) != public:
                        _admit(self._db, device, public, AGGREGATOR, step.unix_s)
            case Opened():
                self._step_on(step.digest, OPENED, step.count, step.unix_s)
                (number,) = self._db.execute("SELECT coalesce(max(number), 0) + 1 FROM log").fetchone()
                insert(self._db, "log", (number, step.entry))
            case Abandoned():
                self._step_on(step.digest, ABANDONED, step.count, step.unix_s)
                self._db.execute('DELETE FROM used WHERE "set" = ?', (step.digest,))
            case _:
                assert_never(step)

    def _step_on(self, digest: bytes, state: str, count: int, unix_s: float) -> None:
        found = self._db.execute("SELECT n, base, context FROM sets WHERE digest = ?", (digest,)).fetchone()
        insert(self._db, "sets", (digest, state, count, *(found or (0, 0, b"")), unix_s))

    def note(self, note: Note) -> None:
        """Keep the facts, and add to the counters."""
        with naming(self._path), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for fact in note.facts.items():
                insert(self._db, "notes", fact)
            for name in note.counters:
                found = self._db.execute("SELECT value FROM counters WHERE name = ?", (name,)).fetchone()
                insert(self._db, "counters", (name, 1 + (found[0] if found else 0)))

    # -- Records

    def state_of(self, digest: bytes) -> str | None:
        found: str | None = self._one("SELECT state FROM sets WHERE digest = ?", digest)
        return found

    def used_in(self, device: str, base: int) -> bytes | None:
        found: bytes | None = self._one('SELECT "set" FROM used WHERE device = ? AND base = ?', device, base)
        return found

    def key_of(self, device: str) -> bytes | None:
        found: bytes | None = self._one("SELECT public FROM roster WHERE device = ? AND active", device)
        return found

    def device_of(self, public: bytes) -> str | None:
        found: str | None = self._one("SELECT device FROM roster WHERE public = ?", public)
        return found

    def _one(self, query: str, *values: object) -> Any:
        with naming(self._path):
            found = self._db.execute(query, values).fetchone()
        return None if found is None else found[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The data for `ternbus helper status`, which can be read while the helper runs."""

    state: State
    sets: Mapping[str, int]  # number of sets by their state
    devices: int  # on the roster
    facts: Mapping[str, Any]
    counters: Mapping[str, int]


def summary(folder: Path) -> Summary:
    """Read the store of a helper that may be running. Raises `ConfigError` if it is missing or empty."""
    with naming(folder / FILE), closing(_reading(folder)) as db:
        state = _state(db)
        assert state is not None  # noqa: S101 - `_reading` has checked it
        return Summary(
            state=state,
            sets=dict(db.execute("SELECT state, count(*) FROM sets GROUP BY state")),
            devices=db.execute("SELECT count(*) FROM roster WHERE active").fetchone()[0],
            facts=dict(db.execute("SELECT name, value FROM notes")),
            counters=dict(db.execute("SELECT name, value FROM counters ORDER BY name")),
        )


def roster(folder: Path) -> list[Admitted]:
    """All keys that were ever on the roster, by device, the active one first."""
    with naming(folder / FILE), closing(_reading(folder)) as db:
        query = (
            "SELECT device, public, active, admitted_by, admitted_s FROM roster "
            "ORDER BY device, active DESC, admitted_s DESC"
        )
        return [
            Admitted(device=device, public=public, active=bool(active), admitted_by=by, admitted_s=at)
            for device, public, active, by, at in db.execute(query)
        ]


def log(folder: Path) -> Iterator[bytes]:
    """The entries of the log, as packed, in order."""
    with naming(folder / FILE), closing(_reading(folder)) as db:
        yield from (entry for (entry,) in db.execute("SELECT entry FROM log ORDER BY number"))


def admit(folder: Path, device: str, public: bytes, unix_s: float) -> bool:
    """Put a device on the roster, with this key in place of an earlier one; also while the helper runs.

    Returns whether that changed anything. Raises `ConfigError` for a key that another device has, or had.
    """
    with naming(folder / FILE), closing(_reading(folder)) as db, db:
        db.execute("BEGIN IMMEDIATE")
        _forget_the_aggregators(db)
        found = db.execute("SELECT device, active FROM roster WHERE public = ?", (public,)).fetchone()
        if found is not None and found[0] != device:
            raise ConfigError(f"the key {public.hex()} is that of {found[0]}: a key has one name; check both")
        if found is not None and found[1]:
            return False
        _admit(db, device, public, OWN, unix_s)
        return True


def remove(folder: Path, device: str) -> None:
    """Take a device off the roster; its keys stay bound to its name. Raises `ConfigError` if it is not on it."""
    with naming(folder / FILE), closing(_reading(folder)) as db, db:
        db.execute("BEGIN IMMEDIATE")
        if not _deactivate(db, device):
            command = f"ternbus helper roster {quoted(folder)}"
            raise ConfigError(f"{device} is not on the roster: `{command}` lists who is")


def check(folder: Path) -> None:
    """Raises `ConfigError` if the store is missing or empty: a new one would have forgotten every set."""
    path = folder / FILE
    if not path.is_file() or not path.stat().st_size:
        raise ConfigError(f"{path} is missing or empty; {remedy(path)}")


def _reading(folder: Path) -> sqlite3.Connection:
    check(folder)
    return open_for_reading(folder / FILE)


def _admit(db: sqlite3.Connection, device: str, public: bytes, by: str, unix_s: float) -> None:
    _deactivate(db, device)
    insert(db, "roster", (public, device, 1, by, unix_s))


def _forget_the_aggregators(db: sqlite3.Connection) -> None:
    """Take the keys off the roster that an aggregator put there: it may have made them up."""
    db.execute("DELETE FROM roster WHERE admitted_by = ?", (AGGREGATOR,))


def _deactivate(db: sqlite3.Connection, device: str) -> int:
    """Make the device's active key a former one; returns how many there were."""
    query = "SELECT public, device, 0, admitted_by, admitted_s FROM roster WHERE device = ? AND active"
    former = db.execute(query, (device,)).fetchall()
    for row in former:
        insert(db, "roster", row)
    return len(former)


def _stored(value: Any) -> Any:
    return str(int(value)) if isinstance(value, int) else value  # SQLite's integers have 64 bits and a sign


def _state(db: sqlite3.Connection) -> State | None:
    kept = dict(db.execute("SELECT name, value FROM kept"))
    if not kept:
        return None
    keys = [
        BoxKey(number=number, secret=secret, made_s=made_s, retired_s=retired_s)
        for number, secret, made_s, retired_s in db.execute(
            "SELECT number, secret, made_s, retired_s FROM box_keys ORDER BY number"
        )
    ]
    numbers = {name: int(kept[name]) for name in _NUMBERS}
    return State(box_keys=tuple(keys), enrolled=kept["enrolled"] == "1", log_hash=kept["log_hash"], **numbers)
