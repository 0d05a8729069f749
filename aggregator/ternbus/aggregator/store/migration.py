"""The migrations of the ledger, from each format to the next. ``schema.py`` has the tables of the newest.

A change of what the ledger holds raises ``FORMAT`` and adds a step here, with a module of its own for what it does.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

from ternbus.aggregator.store import checksums, format_1, format_5, format_6, format_7, format_8
from ternbus.aggregator.store.bodies import BODIES
from ternbus.aggregator.store.remedy import remedy, start_command
from ternbus.aggregator.store.schema import FORMAT
from ternbus.aggregator.store.vectors import VECTORS
from ternbus.broker import store_format
from ternbus.broker.errors import ConfigError, CorruptError
from ternbus.broker.path_errors import quoted
from ternbus.broker.store_format import Formats, Step


def _read(db: sqlite3.Connection) -> object:
    row = db.execute("SELECT value FROM facts WHERE name = 'format'").fetchone()
    return None if row is None else row[0]


def _write(db: sqlite3.Connection, number: int) -> None:
    if number < format_6.CHECKED:
        db.execute("UPDATE facts SET value = ? WHERE name = 'format'", (number,))
    else:
        checksums.insert(db, "facts", ("format", number), replace=True)


FORMATS: Final = Formats(
    newest=FORMAT,
    steps={
        1: Step(to=5, change=format_1.to_5),  # 2, 3 and 4 were given to nothing
        5: Step(to=6, change=format_5.to_6),
        6: Step(to=7, change=format_6.to_7),
        7: Step(to=8, change=format_7.to_8),
        8: Step(to=9, change=format_8.to_9),
    },
    read=_read,
    write=_write,
    beside=(BODIES, VECTORS),
)


def refusal(path: Path, found: object) -> ConfigError | CorruptError:
    """Why a ledger of this format cannot be used as it is, and what to do."""
    command = f"ternbus aggregator {start_command(path.parent)} {quoted(path.parent)}"
    return FORMATS.refusal(path, found, f"`{command}` migrates it when it starts")


def migrate(path: Path) -> None:
    """Bring a ledger to the newest format. The caller holds the directory's lock; ConfigError where it cannot be."""
    if not path.exists():
        return  # to open it says so
    try:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=30.0)) as db:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA secure_delete = FAST")  # as in the ledger: an invitation's code is in no free page
            store_format.migrate(db, path, FORMATS)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise store_format.unreadable(path, error, remedy(path.parent)) from error
