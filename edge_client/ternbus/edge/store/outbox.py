"""The device's durable state in one SQLite file; each save is one transaction, on stable storage where it has to be.

It converts a `State` into rows and back. A second process can read the file at the same time.
"""

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from ternbus.broker import store_format
from ternbus.broker.crash_points import reached
from ternbus.broker.errors import ConfigError
from ternbus.broker.path_errors import quoted
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.schema import Vector, type_f32
from ternbus.broker.store_format import checksum
from ternbus.broker.sums.masks import SEED_BYTES
from ternbus.edge.core.foreign_numbers import cloned_counter
from ternbus.edge.core.state import (
    UNTOLD,
    AnsweredUpdate,
    Asked,
    OutstandingUpdate,
    PrivatePart,
    State,
    Statistics,
)
from ternbus.edge.plan.privacy import Account
from ternbus.edge.store.outbox_format import (
    COLUMNS,
    RESTORE,
    insert,
    insert_all,
    naming,
    open_for_reading,
    open_for_writing,
    remedy,
)

FILE: Final = "outbox.db"
RECEIPTS_MAX: Final = 100_000
_NUMBERS: Final = (
    "enrolled", "seq_limit", "session", "head_version", "head_seq", "answered_base", "evaluated", "accepted",
    "receipt_seq",
)  # fmt: skip
_RARE: Final = (
    "local",
    "left",
    "cards",
    "refusal",
    "statistics",
    "arm",
)  # most devices have none of these, and an earlier version wrote none


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The data for `ternbus edge status`, which can be read while the device runs."""

    state: State
    counters: Mapping[str, int]
    last: AnsweredUpdate | None

    @property
    def is_cloned(self) -> bool:
        """Whether a process found that another machine uses the present key."""
        return cloned_counter(self.state.key) in self.counters


class Outbox:
    """The store of one device. SQLite's integers are signed, so unsigned 64-bit numbers are kept as text."""

    def __init__(self, folder: Path, key: KeyId) -> None:
        """Open the file, or create one for a device with this key. The caller holds the directory's lock.

        A file of an older format is migrated. Raises `ConfigError` if that fails, or if the format is newer, and
        `CorruptError` if the file is not as it was written.
        """
        self._path = folder / FILE
        self._path.touch(mode=0o600)
        self._path.chmod(0o600)
        self._remedy = remedy(self._path)
        self._durable = True  # what the connection does at a commit
        self._erases: bool | None = None  # likewise, whether it overwrites what is deleted; None: as SQLite was built
        opened = store_format.opening(self._path, partial(open_for_writing, self._path), self._remedy)
        with opened as self._db, naming(self._path):
            self._stored = _read(self._db)  # the content of the file
            self.state = (self._stored or State(key=key)).with_receipt(0)  # which a save then writes
            self.counters = _counters(self._db)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def save(
        self, state: State, answered: AnsweredUpdate | None, counters: Mapping[str, int], *, durable: bool = True
    ) -> None:
        """Save everything in one transaction. Only changed values are written.

        What is not ``durable`` is in the operating system's hands at the end: it outlives the process, and a cut of the
        power once a durable save has followed (https://sqlite.org/pragma.html#pragma_synchronous, with WAL).
        """
        before = self._stored
        with store_format.naming(self._path, self._remedy), self._db:
            self._synchronize(durable)
            self._erase(before is not None and _is_hidden(before.outstanding))
            self._db.execute("BEGIN IMMEDIATE")
            kept = self._numbers_to_save(state)
            if before is None or state.residual is not before.residual:
                kept.append(("residual", self._save_residual(state.residual)))
            if before is None or state.outstanding is not before.outstanding:
                kept.append(("outstanding", self._save_outstanding(state.outstanding)))
            if before is None or _private(state) is not _private(before):
                kept.append(("private", self._save_private(_private(state))))
            if answered is not None:
                self._save_answered(answered)
            insert_all(self._db, "kept", kept)
            insert_all(self._db, "counters", counters.items() - self.counters.items())
            reached("state-written")
        self.state = self._stored = state
        self.counters = dict(counters)

    def _synchronize(self, durable: bool) -> None:
        if durable is not self._durable:
            self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._durable = durable

    def _erase(self, is_hidden: bool) -> None:
        """Overwrite what is deleted, or leave it in free pages, where it does not cost a second write of each."""
        if is_hidden is not self._erases:
            self._db.execute(f"PRAGMA secure_delete = {'ON' if is_hidden else 'FAST'}")
            self._erases = is_hidden

    def _numbers_to_save(self, state: State) -> list[tuple[str, object]]:
        """The rows of ``kept`` for the fields that have changed."""
        before, is_new = self._stored or State(key=state.key), self._stored is None
        return [
            (name, as_value(new))
            for (name, as_value), new, old in zip(_VALUES.items(), _values(state), _values(before), strict=True)
            if (new is not old and new != old) or (is_new and name not in _RARE)
        ]

    def _save_residual(self, residual: Vector | None) -> str:
        if residual is None:
            return self._save_whole("residual", None)
        return self._save_whole("residual", (np.ascontiguousarray(residual, dtype=type_f32).data,))

    def _save_outstanding(self, update: OutstandingUpdate | None) -> str:
        if update is None:
            return self._save_whole("outstanding", None)
        row = (
            str(update.seq), str(update.base), update.samples, json.dumps(dict(update.metrics)), update.codec,
            update.encoding, update.encoded, update.sealed, update.frame_bytes,
        )  # fmt: skip
        return self._save_whole("outstanding", row)

    def _save_private(self, part: PrivatePart | None) -> str:
        if part is None:
            return self._save_whole("private", None)
        row = (part.terms, part.context, part.min, b"".join(part.seeds), b"".join(part.boxes))
        return self._save_whole("private", row)

    def _save_whole(self, table: str, row: Sequence[object] | None) -> str:
        """Let a table have this row only, or none; what ``kept`` says of it."""
        self._db.execute(f"DELETE FROM {table}")  # noqa: S608 - our own name
        if row is None:
            return ""
        insert(self._db, table, row)
        return str(checksum(*row))

    def _save_answered(self, answered: AnsweredUpdate) -> None:
        row = (
            bytes(answered.key), str(answered.seq), str(answered.base), answered.outcome, str(answered.version),
            answered.digest,
        )  # fmt: skip
        insert(self._db, "receipts", row)
        self._db.execute("DELETE FROM receipts WHERE number <= (SELECT max(number) FROM receipts) - ?", (RECEIPTS_MAX,))


def summary(folder: Path) -> Summary:
    """Read the outbox of a device that may be running. Raises `ConfigError` if it has no state."""
    path = folder / FILE
    check(folder)
    with naming(path), closing(open_for_reading(path)) as db:
        rows = receipts(db, limit=1, told=True)
        state = _read(db)
        assert state is not None  # noqa: S101 - checked above, and no save removes it
        return Summary(state=state, counters=_counters(db), last=rows[0] if rows else None)


def exists(folder: Path) -> bool:
    """Whether there is an outbox with a state."""
    path = folder / FILE
    if not (path.is_file() and path.stat().st_size):
        return False
    with naming(path), closing(open_for_reading(path)) as db:
        return bool(db.execute("SELECT 1 FROM kept").fetchone())


def check(folder: Path) -> None:
    """Raises `ConfigError` if the outbox is missing or empty. A new one would use sequence numbers again."""
    path = folder / FILE
    if exists(folder):
        return
    raise ConfigError(
        f"{path} is missing or empty: {RESTORE}, or run `ternbus edge join` again; if the device had "
        f"joined, with a new invitation: `ternbus edge rejoin INVITATION.toml {quoted(folder)}`; its privacy "
        "account is lost"
    )


def answers(folder: Path) -> list[AnsweredUpdate]:
    """The stored receipts, newest first, and what became of updates without one."""
    with naming(folder / FILE), closing(open_for_reading(folder / FILE)) as db:
        return receipts(db, limit=RECEIPTS_MAX)


def counters(folder: Path) -> dict[str, int]:
    """The counters of a device that may be running; empty if it has no outbox yet."""
    if not (folder / FILE).exists():
        return {}
    with naming(folder / FILE), closing(open_for_reading(folder / FILE)) as db:
        return _counters(db)


def receipts(db: sqlite3.Connection, *, limit: int, told: bool = False) -> list[AnsweredUpdate]:
    """The newest answered updates first; with ``told``, those that a receipt has answered."""
    query = (
        "SELECT key, seq, base, outcome, version, digest FROM receipts "
        "WHERE outcome NOT IN (?, ?) ORDER BY number DESC LIMIT ?"
    )
    without = UNTOLD if told else ("", "")
    return [
        AnsweredUpdate(
            key=KeyId(key), seq=int(seq), base=int(base), outcome=outcome, version=int(version), digest=digest
        )
        for key, seq, base, outcome, version, digest in db.execute(query, (*without, limit))
    ]


def _counters(db: sqlite3.Connection) -> dict[str, int]:
    return dict(db.execute("SELECT name, value FROM counters"))


def _read(db: sqlite3.Connection) -> State | None:
    values = dict(db.execute("SELECT name, value FROM kept"))
    if not values:
        return None
    values.setdefault("receipt_seq", "-1")  # an earlier version wrote none, in this format too
    numbers = {name: int(values[name]) for name in _NUMBERS if name != "enrolled"}
    vector = db.execute("SELECT vector FROM residual").fetchone()
    return State(
        key=KeyId(values["key"]),
        enrolled=values["enrolled"] == "1",
        schema=values["schema"],
        head_digest=values["head_digest"],
        protected=values["protected"],
        # an earlier version wrote none of these, and nor do most devices
        local=values.get("local", b""),
        left=int(values.get("left", -1)),
        cards=cards_of(values.get("cards", "{}")),
        refusal=values.get("refusal", ""),
        statistics=statistics_of(values["statistics"]) if "statistics" in values else Statistics(),
        account=Account.loads(values["account"]),
        residual=np.frombuffer(vector[0], dtype=type_f32).astype(np.float32) if vector else None,
        outstanding=_outstanding(db),
        **numbers,
    )


def _outstanding(db: sqlite3.Connection) -> OutstandingUpdate | None:
    row = db.execute(f"SELECT {COLUMNS['outstanding']} FROM outstanding").fetchone()  # noqa: S608 - our own names
    if row is None:
        return None
    private = db.execute(f"SELECT {COLUMNS['private']} FROM private").fetchone()  # noqa: S608 - our own names
    arm = db.execute("SELECT value FROM kept WHERE name = 'arm'").fetchone()
    return replace(
        outstanding_of(row),
        private=None if private is None else private_of(private),
        arm=None if arm is None else arm_of(arm[0]),
    )


def _is_hidden(update: OutstandingUpdate | None) -> bool:
    """Whether an update has left the device in a form that shows nothing of it."""
    return update is not None and (update.private is not None or bool(update.sealed))


def _private(state: State) -> PrivatePart | None:
    return None if state.outstanding is None else state.outstanding.private


def _dumps(cards: Mapping[bytes, int]) -> str:
    return json.dumps({key.hex(): number for key, number in cards.items()})


def _dumps_statistics(known: Statistics) -> str:
    return json.dumps(
        {"request": known.request, "content": known.content.hex(), "asked": [asdict(each) for each in known.asked]}
    )


_VALUES: Final[Mapping[str, Callable[[Any], object]]] = {  # what `kept` holds of each field
    **dict.fromkeys(_NUMBERS, lambda number: str(int(number))),
    **dict.fromkeys(("schema", "head_digest", "protected", "local", "refusal"), lambda value: value),
    "key": bytes,
    "account": Account.dumps,
    "left": str,
    "arm": str,
    "cards": _dumps,
    "statistics": _dumps_statistics,
}
_values: Final[Callable[[State], tuple[Any, ...]]] = attrgetter(*_VALUES)


def arm_of(text: str) -> int | None:
    """The arm of the outstanding update, by which no other is trained."""
    return None if int(text) < 0 else int(text)


def cards_of(text: str) -> dict[bytes, int]:
    """The highest numbers of helpers' box keys, by the helpers' keys."""
    return {bytes.fromhex(key): int(number) for key, number in json.loads(text).items()}


def statistics_of(text: str) -> Statistics:
    """What a device has answered to requests for statistics."""
    table = json.loads(text)
    asked = tuple(Asked(**each) for each in table["asked"])
    return Statistics(request=table["request"], content=bytes.fromhex(table["content"]), asked=asked)


def private_of(row: Sequence[Any]) -> PrivatePart:
    """What an update of a private sum has beside its words, in a row of its table, in the order of ``COLUMNS``."""
    terms, context, least, seeds, boxes = row
    helpers = len(seeds) // SEED_BYTES
    return PrivatePart(terms=terms, context=context, min=least, seeds=_cut(seeds, helpers), boxes=_cut(boxes, helpers))


def _cut(joined: bytes, count: int) -> tuple[bytes, ...]:
    size = len(joined) // count
    return tuple(joined[place * size : (place + 1) * size] for place in range(count))


def outstanding_of(row: Sequence[Any]) -> OutstandingUpdate:
    """The update in a row of its table, in the order of ``COLUMNS``."""
    seq, base, samples, metrics, codec, encoding, encoded, sealed, frame_bytes = row
    return OutstandingUpdate(
        seq=int(seq),
        base=int(base),
        samples=samples,
        metrics=json.loads(metrics),
        codec=codec,
        encoding=encoding,
        encoded=encoded,
        sealed=sealed,
        frame_bytes=frame_bytes,
    )
