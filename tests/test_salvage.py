"""What is read of a ledger's table when a page of it is damaged: all rows of its other pages."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from ternbus.aggregator.store import checksums
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.aggregator.store.salvage import Salvaged, salvage
from ternbus.broker.protocol.identity import Identity

ROWS = 1000
PUBLIC = Identity(bytes(32)).public


def key_of(number: int) -> bytes:
    """32 bytes by which the page of a row is found in the file."""
    return number.to_bytes(2, "big") * 16


def name_of(number: int) -> str:
    """Names are in another order than rows."""
    return f"pi-{number * 7919 % 1000:03}"


def row_of(table: str, number: int) -> tuple[object, ...]:
    """As `COLUMNS` orders it."""
    name, key = name_of(number), key_of(number)
    return {
        "devices": (name, key, bytes(64), "enrolled", 1.0, None, "", "", 0, "", None, 0, "train"),
        "invitations": (name, key.hex(), 1.0, 2.0, "train"),
        "helpers": (name, key, bytes(64), b"", -1, "", "", None, None, "", 1.0, 2.0),
        "keys": (name, key[:8], key, "current", 1, "", "", 1, 0),
        "updates": (number + 1, name, key[:8], 1, 1, key, 0, 1, 1.0, "ternary/1", "raw", *[None] * 3, 1.0, *[None] * 3),
    }[table]


def damage(path: Path, mark: bytes) -> None:
    """Make the page of a row unreadable."""
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[16:18], "big")
    start = content.index(mark) // size * size
    content[start : start + size] = b"\xff" * size
    path.write_bytes(content)


def read(folder: Path, scratch: str) -> Salvaged:
    return salvage(folder, folder / scratch, PUBLIC)


def make(path: Path, table: str) -> None:
    """A ledger with many rows in one table, all in its file."""
    Ledger.create(path, {}).close()
    with closing(sqlite3.connect(path)) as db:
        for number in range(ROWS):
            checksums.insert(db, table, row_of(table, number))
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@pytest.mark.parametrize("table", ["devices", "helpers", "invitations", "keys", "updates"])
def test_rows_on_other_pages_are_read(table: str, tmp_path: Path) -> None:
    make(tmp_path / LEDGER, table)
    before = {row[0] for row in read(tmp_path, "before").rows[table]}
    mark = key_of(ROWS // 2)
    damage(tmp_path / LEDGER, mark.hex().encode() if table == "invitations" else mark)
    found = read(tmp_path, "after")
    after = {row[0] for row in found.rows[table]}
    assert len(before) == ROWS
    assert after < before
    assert len(after) > 0.9 * ROWS
    assert any(f"rows of {table}" in each for each in found.lost)


@pytest.mark.parametrize("table", ["devices", "keys"])
def test_rows_between_two_damaged_names_are_read(table: str, tmp_path: Path) -> None:
    make(tmp_path / LEDGER, table)
    content = bytearray((tmp_path / LEDGER).read_bytes())
    for number in (10, ROWS - 40):
        content[content.index(name_of(number).encode() + key_of(number)[:8])] ^= 0x80  # no UTF-8 any more
    (tmp_path / LEDGER).write_bytes(content)
    found = read(tmp_path, "scratch")
    assert len(found.rows[table]) == ROWS - 2
    assert len([each for each in found.lost if each.startswith(table)]) == 2
