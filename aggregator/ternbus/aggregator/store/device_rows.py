"""The rows of the status's table of devices, from the ledger."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from ternbus.aggregator.core.clones import CLONED
from ternbus.aggregator.core.registry import EVALUATOR
from ternbus.aggregator.store import answers, metric_rows
from ternbus.aggregator.store.answers import Tally
from ternbus.aggregator.store.ledger import Ledger
from ternbus.aggregator.store.measurements import Measurements
from ternbus.aggregator.store.rows import failing, unsigned


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """What the ledger has by device beside the devices' own rows."""

    tallies: Mapping[str, Tally]
    losses: Mapping[str, float]
    accepted_at: Mapping[str, float]
    waits: Set[str]  # an update of it waits for a merge
    evaluated: Mapping[str, tuple[int, float]]  # the newest version that it has measured on the test data, and when

    def about(self, name: str, accepted: int, role: str, outcome: str, reason: str) -> dict[str, Any]:
        tally = self.tallies[name]
        answered = accepted + tally.invalid + tally.stale
        at = self.accepted_at.get(name) if outcome == "accepted" else tally.at or None
        version, measured_at = self.evaluated.get(name, (None, None))
        return {
            "answer": {"outcome": outcome, "reason": reason, "at": at} if outcome else None,
            "invalid": tally.invalid,
            "stale": tally.stale,
            "refused_share": tally.invalid / answered if answered else None,
            "stale_share": tally.stale / answered if answered else None,
            "in_a_row": 0 if outcome == "accepted" else tally.in_a_row,
            "loss": self.losses.get(name),
            "evaluates": role == EVALUATOR or (version is not None and accepted == 0),
            "evaluated": version,
            "evaluated_at": measured_at,
            "waits": name in self.waits,
        }


def _said(ledger: Ledger) -> _Said:
    db = ledger.db
    accepted = db.execute("SELECT device, max(received_at) FROM updates GROUP BY device")
    return _Said(
        tallies=answers.tallies(db),
        losses=answers.losses(db),
        accepted_at=dict(accepted.fetchall()),
        waits={device for (device,) in db.execute("SELECT DISTINCT device FROM updates WHERE merged IS NULL")},
        evaluated=metric_rows.evaluated(ledger),
    )


def read(
    ledger: Ledger, version: int, measured: Measurements, stated: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """By name, as JSON values; ``version`` is the newest. `status.read` says what they mean."""
    reasons, archived, said = failing(ledger.db), ledger.archived(), _said(ledger)
    return {
        name: {
            "key": key.hex(),
            "role": role,
            "key_state": state,
            "revoked_why": why,
            "state": status or "offline",
            "failing": reasons.get(name),
            "training_on": unsigned(training_on) if training_on < -1 else training_on,
            "last_seq": unsigned(seq),
            "base": base,
            "staleness": None if base is None else version - base,
            "updates": updates + archived.get(name, 0),
            "bytes": size_bytes,
            "seen_at": seen_at,
            "software": software,
            "samples": samples,
            "epsilon": epsilon,
            "local": measured.devices.device(name, measured.better),
            "classes": stated.get(name, {}).get("classes") or None,
            "cloned": cloned or 0,
            "joined_at": joined_at,
            **said.about(name, updates + archived.get(name, 0), role, outcome, reason),
        }
        for (
            name,
            role,
            state,
            why,
            status,
            training_on,
            software,
            seen_at,
            size_bytes,
            joined_at,
            key,
            seq,
            outcome,
            reason,
            updates,
            base,
            epsilon,
            samples,
            cloned,
        ) in _rows(ledger)
    }


def _rows(ledger: Ledger) -> list[tuple[Any, ...]]:
    return ledger.db.execute(
        "SELECT d.name, d.role, d.state, d.why, d.status, d.base, d.software, d.seen_at, d.update_bytes,"
        " d.enrolled_at, k.key, k.seq, k.outcome, k.reason,"
        " (SELECT count(*) FROM updates u WHERE u.device = d.name),"
        " (SELECT max(base) FROM updates u WHERE u.device = d.name),"
        " (SELECT epsilon FROM updates u WHERE u.device = d.name ORDER BY id DESC LIMIT 1),"
        " (SELECT samples FROM updates u WHERE u.device = d.name ORDER BY id DESC LIMIT 1),"
        " (SELECT value FROM counts c WHERE c.name = ? || lower(hex(k.key)))"
        " FROM devices d JOIN keys k ON k.device = d.name AND k.public = d.public ORDER BY d.name",
        (f"{CLONED}:",),
    ).fetchall()
