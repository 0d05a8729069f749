"""The log of merges in the ledger, and the rows of other tables about the same merges.

Entries of before may be in archives, which the ledger names: ``archives.py`` makes them.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

from ternbus.aggregator.store.ledger import Ledger
from ternbus.aggregator.store.remedy import reading, remedy
from ternbus.aggregator.store.rows import signed, unsigned
from ternbus.aggregator.store.schema import DROPPED
from ternbus.broker import files, store_format
from ternbus.broker.errors import CorruptError
from ternbus.broker.protocol.merge_log import PrivateMember

COMPARED_FROM: Final = "compared_from"  # a fact: from this version on the tables have all that the log names
ARCHIVES: Final = "archives"  # a fact: [name, digest, before] of each, oldest first, in JSON
FOLDER: Final = "archive"
ENTRIES: Final = "SELECT version, entry FROM log WHERE ? IS NULL OR version = ? ORDER BY version"


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """A file with old rows; ``digest`` is its BLAKE2b-256, its versions are those below ``before``."""

    path: Path
    digest: bytes
    before: int

    def entries(self, version: int | None) -> Iterator[tuple[int, bytes]]:
        """As `entries` gives them; CorruptError where the file is not as it was written."""
        with self.opened() as db:
            yield from db.execute(ENTRIES, (version, version))

    @contextmanager
    def opened(self) -> Iterator[sqlite3.Connection]:
        """Read its tables, which are the ledger's; CorruptError where the file is not as it was written."""
        self.check()
        with (
            store_format.naming(self.path, remedy(self.path.parent.parent)),
            closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?immutable=1", uri=True)) as db,
        ):
            yield db

    def check(self) -> None:
        """Raise CorruptError where the file is not there, or not as it was written."""
        with reading(self.path):
            found = files.digest(self.path)
        if found != self.digest:
            raise CorruptError(f"{self.path} is not as it was written; {remedy(self.path.parent.parent)}")


def archives(ledger: Ledger) -> list[Archive]:
    """Those that the ledger names, oldest first."""
    return listed(ledger.path.parent, ledger.fact(ARCHIVES))


def listed(directory: Path, fact: str | None) -> list[Archive]:
    """Those of a directory, as the fact ``ARCHIVES`` names them."""
    return [
        Archive(path=directory / FOLDER / name, digest=bytes.fromhex(digest), before=before)
        for name, digest, before in json.loads(fact or "[]")
    ]


def parts(ledger: Ledger, version: int | None = None) -> Iterator[Iterator[tuple[int, bytes]]]:
    """`entries`, of each archive and then of the ledger; one archive may be damaged, and others not."""
    for archive in archives(ledger):
        yield archive.entries(version)
    yield ledger.db.execute(ENTRIES, (version, version))


def entries(ledger: Ledger, version: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(version, packed entry) of all versions, or of one, in their order; the entries are not checked."""
    return chain.from_iterable(parts(ledger, version))


def digest(ledger: Ledger, version: int) -> bytes | None:
    """The digest of a version's vector; None where the table of versions does not have it."""
    row = ledger.db.execute("SELECT digest FROM versions WHERE version = ?", (version,)).fetchone()
    return None if row is None else bytes(row[0])


def merged(ledger: Ledger, version: int) -> set[tuple[str, bytes, int, bytes]]:
    """(device, key id, seq, digest of the message) of each update in a version."""
    rows = ledger.db.execute("SELECT device, key, seq, digest FROM updates WHERE merged = ?", (version,))
    return {(device, key, unsigned(seq), digest) for device, key, seq, digest in rows}


def is_dropped(ledger: Ledger, update: PrivateMember) -> bool:
    """Whether a private update was accepted, and no version contains it."""
    about = (update.device, update.key, signed(update.seq), update.digest, DROPPED)
    query = "SELECT 1 FROM updates WHERE device = ? AND key = ? AND seq = ? AND digest = ? AND merged = ?"
    return ledger.db.execute(query, about).fetchone() is not None
