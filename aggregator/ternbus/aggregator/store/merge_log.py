"""The log of merges as the ledger holds it, and what its other tables say of the same merges."""

from collections.abc import Iterator
from typing import Final

from ternbus.aggregator.store.ledger import Ledger
from ternbus.aggregator.store.rows import unsigned

COMPARED_FROM: Final = "compared_from"  # a fact: from this version on the tables have all that the log names


def entries(ledger: Ledger, version: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(version, packed entry) of all versions, or of one, in their order; nothing is checked."""
    yield from ledger.db.execute(
        "SELECT version, entry FROM log WHERE ? IS NULL OR version = ? ORDER BY version", (version, version)
    )


def digest(ledger: Ledger, version: int) -> bytes | None:
    """The digest of a version's vector; None where the table of versions does not have it."""
    row = ledger.db.execute("SELECT digest FROM versions WHERE version = ?", (version,)).fetchone()
    return None if row is None else bytes(row[0])


def merged(ledger: Ledger, version: int) -> set[tuple[str, bytes, int, bytes]]:
    """(device, key id, seq, digest of the message) of each update in a version."""
    rows = ledger.db.execute("SELECT device, key, seq, digest FROM updates WHERE merged = ?", (version,))
    return {(device, key, unsigned(seq), digest) for device, key, seq, digest in rows}
