"""Private updates and sets as rows of the ledger, written in the caller's transaction.

A row of ``private_updates`` is kept until its update is merged, or for good, without its header, if it was dropped. A
row of ``sets`` is kept until a start needs the set no more: it was abandoned everywhere, or merged before the version
at which a start begins.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

from ternbus.aggregator.core import records
from ternbus.aggregator.core.sets import HELPER_LOST, REFUSED, REVOKED
from ternbus.aggregator.store import checksums
from ternbus.aggregator.store.schema import DROPPED
from ternbus.aggregator.sums.decode import RANGE
from ternbus.aggregator.sums.private_sets import ABANDONED, MADE, OPENED, OPENING, PrivateUpdate
from ternbus.broker.protocol.messages import PRIVATE

Written = (
    records.UpdatesDropped
    | records.SetMade
    | records.SetOpening
    | records.SetOpened
    | records.SetAbandoned
    | records.SetForgotten
    | records.AsksCounted
)
ASKS: Final = "asks"  # a fact: the digests of sets, by the helper that has not answered for them, in JSON
_ONE: Final = "digest = :digest"
_OF_DEVICE: Final = "update_id = (SELECT id FROM updates WHERE device = :device AND base = :base)"
DAMAGED: Final = "damaged"
NEWEST_MAX: Final = 1000  # updates that are looked at, so that a status takes no longer with a long history
AT_HELPERS: Final = {REFUSED, HELPER_LOST, RANGE, "bad-words", "bad-length"}  # why: somebody should look


def accepted(db: sqlite3.Connection, number: int, private: PrivateUpdate) -> None:
    """What helpers are asked by, beside the update's own row."""
    member = private.member
    values = (number, private.context, member.header, member.signature, private.min, None, "", None)
    checksums.insert(db, "private_updates", values)


def write(db: sqlite3.Connection, record: Written) -> None:
    match record:
        case records.SetMade():
            values = (record.digest, record.context, record.base, record.staleness, len(record.devices), MADE)
            checksums.insert(db, "sets", (*values, None, None), replace=True)
            for device in record.devices:
                about = {"digest": record.digest, "device": device, "base": record.base}
                checksums.update(db, "private_updates", {"set_digest": ":digest"}, _OF_DEVICE, about)
        case records.SetOpening():
            _state(db, record.digest, OPENING)
        case records.SetOpened():
            about = {"digest": record.digest, "total": record.total, "state": OPENED}
            checksums.update(db, "sets", {"state": ":state", "sum": ":total"}, _ONE, about)
        case records.SetAbandoned():
            _abandon(db, record.digest)
        case records.SetForgotten():
            _free(db, record.digest)
            db.execute("DELETE FROM sets WHERE digest = ?", (record.digest,))
        case records.AsksCounted():
            unanswered = {helper: [digest.hex() for digest in sets] for helper, sets in record.unanswered.items()}
            checksums.insert(db, "facts", (ASKS, json.dumps(unanswered)), replace=True)
        case records.UpdatesDropped():
            for device in record.devices:
                _drop(db, device, record.base, record.reason)


def merged(db: sqlite3.Connection, version: int, sets: Iterable[bytes]) -> None:
    """A version has these sets, and its entry in the log names all that was dropped before.

    The bodies of their updates are needed no more: a start makes the version again from the sums.
    """
    for digest in sets:
        checksums.update(db, "sets", {"merged": ":version"}, _ONE, {"version": version, "digest": digest})
        db.execute(
            "UPDATE updates SET merged = ?, segment = NULL"
            " WHERE id IN (SELECT update_id FROM private_updates WHERE set_digest = ?)",
            (version, digest),
        )
        db.execute("DELETE FROM private_updates WHERE set_digest = ?", (digest,))
    named = {"logged": ":version", "header": "x''", "signature": "x''"}
    checksums.update(db, "private_updates", named, "why != '' AND logged IS NULL", {"version": version})


def forget_merged(db: sqlite3.Connection, version: int) -> None:
    """A start begins at this version: it needs no sum of before."""
    db.execute("DELETE FROM sets WHERE merged <= ?", (version,))


def revoke(db: sqlite3.Connection, device: str) -> None:
    """Before a start: as `Sets.revoke` does it, for a key that another copy of this ledger knows to be revoked."""
    found = db.execute(
        "SELECT u.base, s.digest, s.state FROM updates u JOIN private_updates p ON p.update_id = u.id"
        " LEFT JOIN sets s ON s.digest = p.set_digest WHERE u.device = ? AND u.merged IS NULL",
        (device,),
    ).fetchall()
    for base, digest, state in found:
        if state in {OPENING, OPENED}:
            continue
        if digest is not None:
            _abandon(db, digest)
        _drop(db, device, base, REVOKED)


def mend(db: sqlite3.Connection) -> list[str]:
    """After a repair, let a start find nothing that lacks a part; in words the accepted updates that are dropped.

    What was merged is in the model. An update of a set that is lost waits again: where helpers know that set, they
    refuse the update in another one.
    """
    db.execute("DELETE FROM sets WHERE merged IS NOT NULL OR base NOT IN (SELECT base FROM contexts)")
    found = db.execute(
        "SELECT s.digest, s.state, s.devices, count(u.id) FROM sets s LEFT JOIN private_updates p"
        " ON p.set_digest = s.digest LEFT JOIN updates u ON u.id = p.update_id AND u.merged IS NULL GROUP BY s.digest"
    ).fetchall()
    lacking = [(digest, state) for digest, state, devices, count in found if count != devices and state != ABANDONED]
    for digest, state in lacking:
        if state == MADE:
            _abandon(db, digest)
        else:
            db.execute("DELETE FROM sets WHERE digest = ?", (digest,))
    spoiled = {digest for digest, state in lacking if state != MADE}
    rows = db.execute(
        "SELECT u.id, u.device, u.base, p.set_digest, u.merged, p.update_id IS NULL OR c.base IS NULL FROM updates u"
        " LEFT JOIN private_updates p ON p.update_id = u.id LEFT JOIN contexts c ON c.base = u.base"
        " WHERE u.codec = ? AND (u.merged IS NULL OR (u.merged = ? AND p.why = '')) ORDER BY u.id",
        (PRIVATE, DROPPED),
    ).fetchall()
    dropped = []
    for number, device, base, digest, merged_in, is_lacking in rows:
        if is_lacking or digest in spoiled or merged_in == DROPPED:
            blank = (number, b"", b"", b"", 0, None, "", None)
            checksums.insert(db, "private_updates", blank, replace=True)
            _drop(db, device, base, DAMAGED)
            if merged_in is None:
                dropped.append(f"update {number} of {device} on version {base}, which was accepted")
    for (digest,) in db.execute(
        "SELECT DISTINCT set_digest FROM private_updates WHERE set_digest IS NOT NULL"
    ).fetchall():
        if not db.execute("SELECT 1 FROM sets WHERE digest = ?", (digest,)).fetchone():
            _free(db, digest)
    return dropped


def _state(db: sqlite3.Connection, digest: bytes, state: str) -> None:
    checksums.update(db, "sets", {"state": ":state"}, _ONE, {"state": state, "digest": digest})


def _abandon(db: sqlite3.Connection, digest: bytes) -> None:
    _state(db, digest, ABANDONED)
    _free(db, digest)


def _free(db: sqlite3.Connection, digest: bytes) -> None:
    checksums.update(db, "private_updates", {"set_digest": "NULL"}, f"set_{_ONE}", {"digest": digest})


def _drop(db: sqlite3.Connection, device: str, base: int, reason: str) -> None:
    about = {"device": device, "base": base, "why": reason}
    change = {"merged": str(DROPPED), "segment": "NULL", f"merged IS {DROPPED}": "1"}
    checksums.update(db, "updates", change, "device = :device AND base = :base", about)
    checksums.update(db, "private_updates", {"why": ":why", "set_digest": "NULL"}, _OF_DEVICE, about)


def status(db: sqlite3.Connection) -> dict[str, Any]:
    """Where private updates are that no version contains, as JSON values.

    ``groups`` are those in no set by base, ``sets`` those in flight with the helpers that have not answered for them as
    ``waits_for``, ``dropped`` how many there were by reason. ``spoiled`` counts by device the sums out of range that it
    was part of: whoever is in all of them sends what it must not, or a helper does. ``refused`` is why one of
    the newest updates that no longer wait is in no version, if a helper refused its set or that came to no sum; else
    None.
    """
    found = db.execute("SELECT value FROM facts WHERE name = ?", (ASKS,)).fetchone()
    unanswered = {} if found is None else json.loads(found[0])
    groups = db.execute(
        "SELECT u.base, count(*) FROM private_updates p JOIN updates u ON u.id = p.update_id"
        " WHERE u.merged IS NULL AND p.set_digest IS NULL GROUP BY u.base ORDER BY u.base"
    )
    sets = db.execute("SELECT digest, base, devices, state FROM sets WHERE merged IS NULL ORDER BY rowid")
    dropped: Counter[str] = Counter()
    for why, count in db.execute("SELECT why, count(*) FROM private_updates WHERE why != '' GROUP BY why ORDER BY why"):
        dropped[why.partition(":")[0]] += count
    spoiled = db.execute(
        "SELECT u.device, count(*) FROM private_updates p JOIN updates u ON u.id = p.update_id"
        " WHERE p.why GLOB ? GROUP BY u.device ORDER BY u.device",
        (f"{RANGE}*",),
    )
    return {
        "groups": [{"base": base, "updates": count} for base, count in groups],
        "sets": [
            {
                "set": digest.hex(),
                "base": base,
                "devices": devices,
                "state": state,
                "waits_for": sorted(helper for helper, names in unanswered.items() if digest.hex() in names),
            }
            for digest, base, devices, state in sets
        ],
        "dropped": dict(dropped),
        "spoiled": dict(spoiled.fetchall()),
        "refused": _refused(db),
    }


def _refused(db: sqlite3.Connection) -> str | None:
    """Of the newest updates those on one version, in whatever order they came."""
    rows = db.execute(
        "SELECT u.base, p.why FROM updates u LEFT JOIN private_updates p ON p.update_id = u.id"
        " WHERE u.merged IS NOT NULL ORDER BY u.id DESC LIMIT ?",
        (NEWEST_MAX,),
    ).fetchall()
    reasons = (str(why or "") for base, why in rows if base == rows[0][0])
    return next((why for why in reasons if why.partition(":")[0] in AT_HELPERS), None)
