"""The way of one update, by its device and number: what the ledger, its archives and the log of merges say of it."""

import sqlite3
from collections.abc import Iterator
from typing import Any, Final

from ternbus.aggregator.core.registry import REVOKED
from ternbus.aggregator.store import merge_log
from ternbus.aggregator.store.ledger import Ledger
from ternbus.aggregator.store.rows import FLOOR, signed, unsigned
from ternbus.aggregator.store.schema import DROPPED
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.merge_log import Entry, unpack

MERGED, WAITING, GONE, REFUSED = "merged", "waiting", "dropped", "refused"  # states of an update
FORGOTTEN: Final = "forgotten"  # a higher number was answered since; the answer to this one was not kept
UNKNOWN: Final = "unknown"  # nothing with this number has come

_ACCEPTED: Final = (
    "SELECT id, base, staleness, samples, discount, digest, received_at, merged FROM updates"
    " WHERE device = ? AND key = ? AND seq = ?"
)


def find(ledger: Ledger, device: str, seq: int) -> list[dict[str, Any]]:
    """What became of the update, as JSON values: a row for each key of the device that may have used the number.

    ``state`` is one of this module's. An accepted update has ``accepted_at``, ``base``, ``staleness``, ``samples``,
    ``discount`` and the ``digest`` of its message; a merged one the ``version``, its ``version_digest``, when it was
    ``made_at``, and the update's ``weight`` and ``share`` of it, for a private one those of its whole ``set``; a
    dropped or refused one its ``reason``. Times are Unix seconds. ConfigError for a device that never joined.
    """
    keys = ledger.db.execute(
        "SELECT key, state, seq, outcome, reason FROM keys WHERE device = ? ORDER BY state != 'active', key", (device,)
    ).fetchall()
    if not keys:
        raise ConfigError(f"no device {device!r} has joined; see `ternbus aggregator devices`")
    return [
        {
            "key": key.hex(),
            "key_state": state,
            **_under_key(ledger, device, key, seq, (unsigned(last), outcome, reason)),
        }
        for key, state, last, outcome, reason in keys
    ]


def _under_key(ledger: Ledger, device: str, key: bytes, seq: int, last: tuple[int, str, str]) -> dict[str, Any]:
    """Of one key; ``last`` is its highest number that was answered, and how."""
    for db in _databases(ledger):
        row = db.execute(_ACCEPTED, (device, key, signed(seq))).fetchone()
        if row is not None:
            return _accepted(ledger, db, (device, key, seq), row)
    answered, outcome, reason = last
    if answered == seq and outcome:
        return {"state": REFUSED, "outcome": outcome, "reason": reason}
    return {"state": FORGOTTEN if answered > seq else UNKNOWN}


def _databases(ledger: Ledger) -> Iterator[sqlite3.Connection]:
    """The ledger, then its archives, the newest first."""
    yield ledger.db
    for archive in reversed(merge_log.archives(ledger)):
        with archive.opened() as db:
            yield db


def _accepted(
    ledger: Ledger, db: sqlite3.Connection, name: tuple[str, bytes, int], row: tuple[Any, ...]
) -> dict[str, Any]:
    number, base, staleness, samples, discount, digest, received_at, merged = row
    found = {
        "accepted_at": received_at,
        "base": base,
        "staleness": staleness,
        "samples": samples,
        "discount": discount,
        "digest": digest.hex(),
    }
    if merged is None:
        return {"state": WAITING, **found}
    if merged == DROPPED:
        return {"state": GONE, **found, "reason": _why(ledger, name, number, base)}
    version_digest, made_at = db.execute("SELECT digest, made_at FROM versions WHERE version = ?", (merged,)).fetchone()
    about = {"version": merged, "version_digest": version_digest.hex(), "made_at": made_at}
    return {"state": MERGED, **found, **about, **_weight(ledger, merged, name)}


def _why(ledger: Ledger, name: tuple[str, bytes, int], number: int, base: int) -> str:
    """Why an accepted update is in no version."""
    private = ledger.db.execute("SELECT why FROM private_updates WHERE update_id = ?", (number,)).fetchone()
    if private is not None and private[0]:
        return str(private[0])
    if withdrawn := _withdrawn(ledger, name, base):
        return withdrawn
    if base >= int(ledger.fact(FLOOR) or 0):
        return "its device was revoked"
    revoked = ledger.db.execute(
        "SELECT 1 FROM keys WHERE device = ? AND key = ? AND state = ?", (*name[:2], REVOKED)
    ).fetchone()
    rolled_back = "the versions that it was made on were withdrawn"
    return f"its device was revoked, or {rolled_back}" if revoked else rolled_back


def _withdrawn(ledger: Ledger, name: tuple[str, bytes, int], base: int) -> str:
    """What the log of merges says of an update in a candidate that was withdrawn: a version of no update is there."""
    query = "SELECT version FROM versions WHERE version > ? AND updates = 0"
    for version in sorted({version for db in _databases(ledger) for (version,) in db.execute(query, (base,))}):
        for _, packed in merge_log.entries(ledger, version):
            for each in Entry.parse(unpack(packed).content).dropped:
                if (each.update.device, each.update.key, each.update.seq) == name:
                    return each.reason
    return ""


def _weight(ledger: Ledger, version: int, name: tuple[str, bytes, int]) -> dict[str, Any]:
    """What the log of merges says of the update in the version; nothing where the log begins later."""
    for _, packed in merge_log.entries(ledger, version):
        entry = Entry.parse(unpack(packed).content)
        for update in entry.updates:
            if (update.device, update.key, update.seq) == name:
                return _share(update.weight, entry)
        for merged in entry.sets:
            if any((member.device, member.key, member.seq) == name for member in merged.members):
                return {**_share(merged.weight, entry), "set": merged.digest.hex()}
    return {}


def _share(weight: float, entry: Entry) -> dict[str, Any]:
    return {"weight": weight, "share": weight / entry.weight if entry.weight else None}
