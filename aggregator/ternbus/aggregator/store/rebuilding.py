"""A new ledger from the sound rows of a damaged one, with a list of what is lost."""

from contextlib import suppress
from typing import Any, Final

from ternbus.aggregator.core.registry import ACTIVE, ANY, REVOKED
from ternbus.aggregator.store import checksums, membership, set_rows
from ternbus.aggregator.store.checksums import COLUMNS
from ternbus.aggregator.store.ledger import Ledger
from ternbus.aggregator.store.rows import unsigned
from ternbus.aggregator.store.salvage import Salvaged
from ternbus.broker.errors import CorruptError
from ternbus.broker.protocol.identity import key_id

TAKEN_OVER: Final = (
    "invitations",
    "metrics",
    "counts",
    "frames",
    "helpers",
    "terms",
    "contexts",
    "private_updates",
    "sets",
)


def rebuild(found: Salvaged, ledger: Ledger) -> list[str]:
    """Fill a new ledger, whose files of bodies are those of the old one; what is lost besides the damaged rows."""
    with ledger.transaction():
        lost = _members(found, ledger)
        for table in TAKEN_OVER:
            for row in found.rows[table]:
                checksums.insert(ledger.db, table, row)
        for row in found.rows["versions"]:
            checksums.insert(ledger.db, "versions", row[:-1], body=None)
        if found.log_is_whole:
            packed = [(version, signed.pack()) for version, signed in found.log.items()]
            ledger.db.executemany("INSERT INTO log VALUES (?, ?)", packed)
        lost += [*_updates(found, ledger), *set_rows.mend(ledger.db)]
    return lost


def _members(found: Salvaged, ledger: Ledger) -> list[str]:
    """Devices and their keys: of one that is there without the other, as much as the other tells."""
    lost = []
    devices = {row[0]: row for row in found.rows["devices"]}
    keys = {(row[0], row[1]): row for row in found.rows["keys"]}
    for name, public, state in [(row[0], row[1], row[3]) for row in devices.values()]:
        if (name, key_id(public)) not in keys:
            keys[name, key_id(public)] = (name, key_id(public), public, state, *_last_answer(found, name, public))
            lost.append(f"what {name} was answered last, but for accepted updates")
    for (name, _), row in keys.items():
        if name not in devices and row[3] in {ACTIVE, REVOKED}:
            devices[name] = (name, row[2], b"", row[3], 0.0, None, "", "", -1, "", None, 0, ANY)
            lost.append(f"the role of {name}, which may train and measure from now on")
    for table, rows in (("devices", devices.values()), ("keys", [row for row in keys.values() if row[0] in devices])):
        for values in rows:
            checksums.insert(ledger.db, table, values)
    return lost


def _last_answer(found: Salvaged, name: str, public: bytes) -> tuple[Any, ...]:
    """seq, outcome, reason, metrics_seq, highest_base of a key whose row is lost."""
    columns = COLUMNS["updates"]
    rows = [dict(zip(columns, row, strict=False)) for row in found.rows["updates"]]
    mine = [row for row in rows if row["device"] == name]
    seqs = [row["seq"] for row in mine if row["key"] == key_id(public)]
    seq = max(seqs, key=unsigned, default=0)
    return seq, "accepted" if seqs else "", "", 0, max((row["base"] for row in mine), default=-1)


def _updates(found: Salvaged, ledger: Ledger) -> list[str]:
    """All rows; of those that wait only the ones whose body is sound are still merged."""
    size, dropped = len(COLUMNS["updates"]), []
    members = {row[0] for row in ledger.db.execute("SELECT name FROM devices")}
    for row in found.rows["updates"]:
        values, merged, segment = row[: size - 1], row[size], row[size + 1]
        if row[1] not in members:
            continue
        waits = merged is None
        checksums.insert(ledger.db, "updates", values, merged=merged, segment=segment if waits else None)
        if waits:
            with suppress(CorruptError, TypeError):
                ledger.body(segment, *row[11:14])
                continue
            dropped.append(f"update {values[0]} of {values[1]} on version {values[4]}, which was accepted")
            membership.drop(ledger.db, "id = :id", {"id": values[0]})
    checksums.renew(ledger.db, "updates")
    return dropped
