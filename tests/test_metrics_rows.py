"""What evaluators have sent is found by its key: as many rows as there are cost no question more."""

import sqlite3
from collections.abc import Callable

import pytest

from ternbus.aggregator.core.records import MetricsReceived
from ternbus.aggregator.store import candidate_rows, checksums, rows, search_rows
from ternbus.aggregator.store.schema import SCHEMA_SQL
from ternbus.broker.protocol.direction import LOWER
from ternbus.broker.protocol.messages import Metrics

Asked = Callable[[sqlite3.Connection, int], object]


def received(version: int) -> MetricsReceived:
    values = {"error": 0.5, "loss": 0.1}
    metrics = Metrics(version=version, samples=9, split="test", values=values, better={"error": LOWER})
    return MetricsReceived(device="judge", seq=version, metrics=metrics)


def ledger(versions: int) -> sqlite3.Connection:
    db = sqlite3.connect(":memory:")
    checksums.register(db)
    db.executescript(SCHEMA_SQL)
    for version in range(versions):
        rows.write(db, received(version), 1.0)
    return db


def steps(versions: int, asked: Asked) -> int:
    """How many instructions SQLite takes for a question, where the evaluator has sent so many metrics."""
    db, taken = ledger(versions), 0

    def count() -> int:
        nonlocal taken
        taken += 1
        return 0

    db.set_progress_handler(count, 1)
    asked(db, versions)
    return taken


@pytest.mark.parametrize(
    "asked",
    [
        lambda db, versions: rows.write(db, received(versions), 2.0),
        lambda db, _: candidate_rows.references(db, ["judge"]),
    ],
    ids=["write", "references"],
)
def test_a_report_is_as_quick_after_many(asked: Asked) -> None:
    assert steps(800, asked) < 1.5 * steps(100, asked)


def test_all_metrics_of_an_evaluator_are_read_in_one_pass() -> None:
    found = search_rows.judgements(ledger(3), 1)
    assert [(name, metrics.version, metrics.better) for name, metrics in found] == [
        ("judge", version, {"error": LOWER}) for version in (1, 2)
    ]
    everything = steps(800, lambda db, _: search_rows.judgements(db, 0))
    assert everything < 1.5 * 8 * steps(100, lambda db, _: search_rows.judgements(db, 0))
