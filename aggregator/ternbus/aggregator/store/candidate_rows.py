"""The candidate for the next version, as facts of the ledger: an earlier Ternbus reads none of them.

Its updates have no version yet, as those in the buffer; ``last`` is the id of the newest of them. So for an earlier
Ternbus, or once the facts are gone, they wait like all others.
"""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ternbus.aggregator.core import records
from ternbus.aggregator.core.canary import Judged
from ternbus.aggregator.merge.accepted import WITHDRAWN
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.store import checksums, membership
from ternbus.aggregator.store.schema import STATED
from ternbus.broker.protocol.messages import Metrics
from ternbus.broker.protocol.ternary import Block

FACTS: Final = ("candidate", "candidate_body", "candidate_reports")
CANDIDATE, BODY, REPORTS = FACTS
Written = records.CandidateMade | records.CandidateEvaluated | records.CandidateDissolved


def write(db: sqlite3.Connection, record: Written) -> None:
    """Write a record's rows."""
    match record:
        case records.CandidateMade():
            (last,) = db.execute("SELECT max(id) FROM updates WHERE merged IS NULL").fetchone()
            about = {"version": record.version, "digest": record.digest.hex(), "last": last}
            about |= {"codec": record.codec, "encoding": record.encoding}
            _set(db, CANDIDATE, json.dumps(about))
            _set(db, BODY, record.body)
            _set(db, REPORTS, "{}")
        case records.CandidateEvaluated():
            reports = json.loads(_get(db, REPORTS) or "{}")
            meta = record.metrics.meta()
            reports[record.device] = {**meta, "candidate": record.metrics.candidate.hex()}
            _set(db, REPORTS, json.dumps(reports))
            membership.metrics_seq(db, record.device, record.seq)
        case records.CandidateDissolved():
            forget(db)


def decided(db: sqlite3.Connection, record: records.VersionMade) -> None:
    """Merge the updates of the candidate into a version, or drop them."""
    last = json.loads(_get(db, CANDIDATE))["last"]
    if record.candidate == WITHDRAWN:
        membership.drop(db, "merged IS NULL AND id <= :last", {"last": last})
    else:
        db.execute("UPDATE updates SET merged = ? WHERE merged IS NULL AND id <= ?", (record.version, last))
    forget(db)


def forget(db: sqlite3.Connection) -> None:
    db.executemany("DELETE FROM facts WHERE name = ?", [(name,) for name in FACTS])


def last_of(db: sqlite3.Connection) -> int | None:
    """The id of the candidate's newest update; None without a candidate for the next version."""
    about = json.loads(_get(db, CANDIDATE) or "null")
    return int(about["last"]) if about is not None and about["version"] == int(_get(db, "version")) + 1 else None


def recover(db: sqlite3.Connection, model: Model) -> Judged:
    """The candidate, from a model whose buffer holds its updates; ValueError where it is not what it was."""
    about, body = json.loads(_get(db, CANDIDATE)), bytes(_get(db, BODY))
    prepared = model.prepare(Block.read(model.schema, about["codec"], about["encoding"], body))
    if prepared.merged.digest.hex() != about["digest"]:
        raise ValueError(f"the candidate for version {about['version']} does not have its digest")
    reports = {device: _metrics(meta) for device, meta in json.loads(_get(db, REPORTS)).items()}
    return Judged(prepared=prepared, encoding=about["encoding"], body=body, reports=reports)


def _metrics(meta: Mapping[str, object]) -> Metrics:
    return Metrics.from_meta({**meta, "candidate": bytes.fromhex(str(meta["candidate"]))})


def references(db: sqlite3.Connection, group: Sequence[str]) -> dict[str, Metrics]:
    """The newest metrics of a published version that each of these members has sent."""
    found = {}
    for name in group:
        row = db.execute(
            "SELECT version, samples, split, entries FROM metrics WHERE device = ? AND split != ?"
            " ORDER BY version DESC LIMIT 1",
            (name, STATED),
        ).fetchone()
        stated = db.execute(
            "SELECT entries FROM metrics WHERE device = ? AND version = 0 AND split = ?", (name, STATED)
        ).fetchone()
        if row is not None:
            better = {} if stated is None else json.loads(stated[0])["better"]
            found[name] = Metrics(
                version=row[0], samples=row[1], split=row[2], values=json.loads(row[3]), better=better
            )
    return found


def status(db: sqlite3.Connection) -> dict[str, object] | None:
    """The candidate as JSON values: ``version``, ``digest``, and the metrics that were reported, by device."""
    about = json.loads(_get(db, CANDIDATE) or "null")
    if about is None:
        return None
    reports = json.loads(_get(db, REPORTS))
    return {
        "version": about["version"],
        "digest": about["digest"],
        "reports": {device: meta["values"] for device, meta in reports.items()},
    }


def _set(db: sqlite3.Connection, name: str, value: object) -> None:
    checksums.insert(db, "facts", (name, value), replace=True)


def _get(db: sqlite3.Connection, name: str) -> Any:
    row = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return None if row is None else row[0]
