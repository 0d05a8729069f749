"""A checksum in every row of the ledger. SQLite's pages have none, so a flipped bit would go undetected.

Each table has a column ``crc``, the CRC-32 of the row's other values. ``log`` has none: its entries are signed and
chained. Columns that change later are left out and checked otherwise: in ``updates`` the version that an update is in,
by the log, and its file, by the body's own checksum; in ``versions`` the body, by its own checksum.
"""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Final

from ternbus.aggregator.store.schema import DROPPED
from ternbus.broker.printable import printable
from ternbus.broker.store_format import checksum

COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "facts": ("name", "value"),
    "devices": (
        "name", "public", "proof", "state", "enrolled_at", "revoked_at", "why", "status", "base", "software",
        "seen_at", "update_bytes", "role",
    ),
    "keys": ("device", "key", "public", "state", "seq", "outcome", "reason", "metrics_seq", "highest_base"),
    "invitations": ("device", "code", "made_at", "expires_at", "role"),
    "updates": (
        "id", "device", "key", "seq", "base", "digest", "staleness", "samples", "discount", "codec", "encoding",
        "place", "size", "checksum", "received_at", "epsilon", "norm", "stated", f"merged IS {DROPPED}",
    ),
    "versions": (
        "version", "digest", "made_at", "updates", "staleness_mean", "staleness_max", "codec", "encoding", "checksum",
    ),
    "snapshots": ("version", "segment", "checksum"),
    "server": ("version", "segment", "checksum"),
    "frames": ("topic", "payload"),
    "metrics": ("device", "version", "split", "samples", "entries", "received_at"),
    "counts": ("name", "value"),
    "requests": ("id", "what", "argument", "done", "error"),
    "helpers": (
        "name", "public", "proof", "card", "count", "status", "software", "seen_at", "answered_at", "code", "made_at",
        "expires_at",
    ),
    "terms": ("digest", "content"),
    "contexts": ("base", "model", "plan", "terms"),
    "private_updates": ("update_id", "context", "header", "signature", "min", "set_digest", "why", "logged"),
    "sets": ("digest", "context", "base", "staleness", "devices", "state", "sum", "merged"),
}  # fmt: skip
KEYS: Final[Mapping[str, int]] = {"keys": 2, "metrics": 3}  # how many of the first columns name a row; else one
FACTS: Final = (  # that every ledger has
    "format", "federation", "schema", "slots", "state", "version", "seq", "session", "segment", "snapshot", "recipe",
)  # fmt: skip
_FIRST: Final = {"updates": (0,)}  # what the last columns, where they are expressions, come to in a new row


def register(db: sqlite3.Connection) -> None:
    """Let SQL compute a row's checksum, as ``row_crc``; every connection that changes rows needs it."""
    db.create_function("row_crc", -1, checksum, deterministic=True)


def insert(
    db: sqlite3.Connection, table: str, values: Sequence[object], *, replace: bool = False, **beside: object
) -> None:
    """Write a row with its checksum. ``values`` are in the order of ``COLUMNS``; ``beside`` is not in the checksum."""
    crc = checksum(*values, *_FIRST.get(table, ()))
    db.execute(_insertion(table, tuple(beside), replace), (*values, *beside.values(), crc))


@cache
def _insertion(table: str, beside: tuple[str, ...], replace: bool) -> str:
    names = (*COLUMNS[table][: len(COLUMNS[table]) - len(_FIRST.get(table, ()))], *beside)
    verb = "INSERT OR REPLACE" if replace else "INSERT"
    places = ", ".join("?" for _ in names)
    return f"{verb} INTO {table} ({', '.join(names)}, crc) VALUES ({places}, ?)"


def update(
    db: sqlite3.Connection, table: str, changes: Mapping[str, str], where: str, parameters: Mapping[str, object]
) -> int:
    """Change columns to SQL expressions in rows, with their checksums; how many rows there were.

    ``changes`` also says what an expression of ``COLUMNS`` comes to, where it changes.
    """
    return db.execute(_change(table, tuple(changes.items()), where), parameters).rowcount


@cache
def _change(table: str, changes: tuple[tuple[str, str], ...], where: str) -> str:
    values = dict(changes)
    crc = ", ".join(values.get(name, name) for name in COLUMNS[table])
    pairs = ", ".join(f"{name} = {value}" for name, value in changes if " " not in name)
    return f"UPDATE {table} SET {pairs}, crc = row_crc({crc}) WHERE {where}"  # noqa: S608 - our own names


def renew(db: sqlite3.Connection, table: str) -> None:
    """Make the checksum of every row anew, from what it holds now."""
    db.execute(f"UPDATE {table} SET crc = row_crc({', '.join(COLUMNS[table])})")  # noqa: S608 - our own names


def damaged(
    db: sqlite3.Connection, table: str, where: str = "1", parameters: Sequence[object] | Mapping[str, object] = ()
) -> Iterator[str]:
    """The rows that do not have their checksum, in words; sqlite3.Error where the table cannot be read to its end."""
    columns = ", ".join(COLUMNS[table])
    before, db.text_factory = db.text_factory, as_it_is
    try:
        rows = db.execute(f"SELECT {columns}, crc FROM {table} WHERE {where}", parameters)  # noqa: S608 - our own names
        found = set()
        for *values, crc in rows:
            if crc != checksum(*values):
                yield f"{table} {shown(values[: KEYS.get(table, 1)])}"
            elif table == "facts":
                found.add(values[0])
        if table == "facts":
            yield from (f"facts {name}" for name in FACTS if name not in found)
    finally:
        db.text_factory = before


def shown(key: Sequence[Any]) -> str:
    """What names a row, for people; it may be anything."""
    parts = (each.hex() if isinstance(each, bytes) else str(each) for each in key)
    return " ".join(map(printable, parts))


def as_it_is(text: bytes) -> str:
    """A ``text_factory`` that reads any text; SQLite's own ends a reading at one that is not UTF-8."""
    return text.decode("utf-8", "surrogateescape")
