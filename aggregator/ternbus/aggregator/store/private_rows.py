"""Helpers, terms and contexts of private sums as rows of the ledger: written, and read at a start."""

import sqlite3
from collections.abc import Mapping
from typing import Final, assert_never

from ternbus.aggregator.core import records
from ternbus.aggregator.core.registry import Invited
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.store import checksums
from ternbus.aggregator.sums.state import ContextOf, PrivateSums
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.sums.terms import SignedCard, Terms

Inserted = (
    records.HelperEnrolled
    | records.HelperInvitationCancelled
    | records.HelperObserved
    | records.CardReceived
    | records.TermsMade
    | records.ContextBegun
)
NO_CODE: Final = {"code": "''", "made_at": "0.0", "expires_at": "0.0"}
ENROLLED: Final = {**NO_CODE, "public": ":public", "proof": ":proof"}
# what was said under another key says nothing of this one
ANEW: Final = {**ENROLLED, "card": "x''", "count": "-1", "status": "''", "seen_at": "NULL", "answered_at": "NULL"}
SEEN: Final = {"status": ":status", "software": ":software", "seen_at": ":now"}
# Stale contexts go when no sum and no waiting update refers to them: a start decodes by their terms.
UNNEEDED: Final = """base < ?
    AND base NOT IN (SELECT base FROM sets)
    AND base NOT IN (SELECT base FROM updates WHERE merged IS NULL)"""


def write(db: sqlite3.Connection, record: Inserted, now: float) -> None:
    """Write a record's rows; ``now`` is the time to write beside them (Unix seconds)."""
    match record:
        case records.HelperEnrolled():
            row = db.execute("SELECT public FROM helpers WHERE name = ?", (record.helper,)).fetchone()
            change = ENROLLED if row == (record.public,) else ANEW
            _update(db, record.helper, change, public=record.public, proof=record.proof)
        case records.HelperInvitationCancelled():
            _update(db, record.helper, NO_CODE)
        case records.HelperObserved():
            change = {"count": ":count", **(SEEN if record.status is not None else {})}
            change |= {"answered_at": ":now"} if record.answered else {}
            status = record.status
            said = ("", "") if status is None else (status.state, status.software)
            _update(db, record.helper, change, count=record.count, now=float(now), status=said[0], software=said[1])
        case records.CardReceived():
            _update(db, record.helper, {"card": ":card"}, card=record.card)
        case records.TermsMade():
            checksums.insert(db, "terms", (record.digest, record.content), replace=True)
        case records.ContextBegun():
            checksums.insert(db, "contexts", (record.base, record.model, record.plan, record.terms), replace=True)
            db.execute(f"DELETE FROM contexts WHERE {UNNEEDED}", (record.oldest,))  # noqa: S608 - our own text
            db.execute("DELETE FROM terms WHERE digest NOT IN (SELECT terms FROM contexts)")
        case _:
            assert_never(record)


def _update(db: sqlite3.Connection, helper: str, change: Mapping[str, str], **values: object) -> None:
    _need(db, helper)
    checksums.update(db, "helpers", change, "name = :helper", {**values, "helper": helper})


def _need(db: sqlite3.Connection, helper: str) -> None:
    if not db.execute("SELECT 1 FROM helpers WHERE name = ?", (helper,)).fetchone():
        checksums.insert(db, "helpers", (helper, b"", b"", b"", -1, "", "", None, None, "", 0.0, 0.0))


def invite(db: sqlite3.Connection, codes: Mapping[str, str], made_at: float, expires_at: float) -> None:
    """Open invitations by helper, in place of those that were open before; times in Unix seconds."""
    change = {"code": ":code", "made_at": ":made_at", "expires_at": ":expires_at"}
    for helper, code in codes.items():
        _update(db, helper, change, code=code, made_at=float(made_at), expires_at=float(expires_at))


def codes(db: sqlite3.Connection) -> dict[str, Invited]:
    """Invitations of helpers that nobody has used; among them those that have expired."""
    rows = db.execute("SELECT name, code, expires_at FROM helpers WHERE code != ''")
    return {name: Invited(code=code, expires_at=expires_at) for name, code, expires_at in rows}


def recover(db: sqlite3.Connection, settings: Settings, schema: Schema) -> PrivateSums | None:
    """The private sums of a federation that has any, as they were when the last record became durable."""
    sums = PrivateSums.of(settings, schema)
    if sums is None:
        return None
    for name, public, proof, card, count in db.execute("SELECT name, public, proof, card, count FROM helpers"):
        helper = sums.helpers.get(name)
        if helper is not None and helper.public == public:
            helper.proof, helper.count = proof, count
            helper.card = SignedCard.of_body(card) if card else None
    rows = db.execute("SELECT c.base, c.model, c.plan, t.content FROM contexts c JOIN terms t ON t.digest = c.terms")
    for base, model, plan, content in rows:
        terms = Terms.parse(content)
        sums.contexts[base] = ContextOf(base=base, model=model, plan=plan, terms=terms, terms_bytes=content)
    if sums.contexts:
        sums.scales = sums.contexts[max(sums.contexts)].terms.scales
    return sums
