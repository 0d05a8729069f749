"""What evaluators have sent is found by its key: as many rows as there are cost no question more."""

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from ternbus.aggregator.core.records import MetricsReceived
from ternbus.aggregator.store import candidate_rows, checksums, metric_rows, rows, search_rows, status
from ternbus.aggregator.store.ledger import Ledger
from ternbus.aggregator.store.schema import SCHEMA_SQL
from ternbus.broker.protocol.direction import LOWER
from ternbus.broker.protocol.messages import Metrics

Asked = Callable[[sqlite3.Connection, int], object]


def received(version: int) -> MetricsReceived:
    values = {"error": 0.5, "loss": 0.1}
    metrics = Metrics(version=version, samples=9, split="test", values=values, better={"error": LOWER})
    return MetricsReceived(device="judge", seq=version, metrics=metrics)


@contextmanager
def ledger(versions: int) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:")) as db:
        checksums.register(db)
        db.executescript(SCHEMA_SQL)
        for version in range(versions):
            rows.write(db, received(version), 1.0)
        yield db


def steps(versions: int, asked: Asked) -> int:
    """How many instructions SQLite takes for a question, where the evaluator has sent so many metrics."""
    with ledger(versions) as db:
        return counted(db, lambda: asked(db, versions))


def counted(db: sqlite3.Connection, asked: Callable[[], object]) -> int:
    taken = 0

    def count() -> int:
        nonlocal taken
        taken += 1
        return 0

    db.set_progress_handler(count, 1)
    asked()
    db.set_progress_handler(None, 0)
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
    with ledger(3) as db:
        found = search_rows.judgements(db, 1)
    assert [(name, metrics.version, metrics.better) for name, metrics in found] == [
        ("judge", version, {"error": LOWER}) for version in (1, 2)
    ]
    everything = steps(800, lambda db, _: search_rows.judgements(db, 0))
    assert everything < 1.5 * 8 * steps(100, lambda db, _: search_rows.judgements(db, 0))


def federation(folder: Path, versions: int, trainers: int = 5) -> Ledger:
    """A ledger in which each trainer and an evaluator have measured all of so many versions."""
    folder.mkdir()
    made = Ledger.create(folder / "ledger.sqlite", {"federation": "lab", "version": versions - 1})
    names = [f"device-{number}" for number in range(trainers)]
    for name in (*names, "judge"):
        public = name.ljust(32).encode()
        checksums.insert(made.db, "devices", (name, public, b"", "active", 1.0, None, "", "idle", 0, "", None, 0, ""))
        checksums.insert(made.db, "keys", (name, public[-8:], public, "active", 0, "", "", 0, -1))
    with made.transaction():
        for version in range(versions):
            row = (version, bytes(32), float(version), 1, 0.0, 0, "", "", 0)
            checksums.insert(made.db, "versions", row)
            rows.write(made.db, received(version), float(version))
            for place, name in enumerate(names):
                own = {"error": place / 10} | ({"personal_error": 0.0} if version == versions - 50 else {})
                measured = Metrics(version=version, samples=9, split="local", values=own)
                rows.write(made.db, MetricsReceived(device=name, seq=version, metrics=measured), float(version))
    return made


def test_a_status_reads_the_metrics_that_it_shows(tmp_path: Path) -> None:
    with closing(federation(tmp_path / "few", 150)) as few, closing(federation(tmp_path / "many", 1200)) as many:
        taken = [counted(each.db, partial(status.read_ledger, each, 20)) for each in (few, many)]
        assert taken[1] < 1.1 * taken[0]
        found, everything = status.read_ledger(many, 20), status.read_ledger(many)
        assert found | {each: everything[each] for each in ("versions", "disk")} == everything
        assert found["versions"] == everything["versions"][-20:]
        assert found["devices"]["device-3"]["local"]["gain"] == {"error": 0.3}  # of the newest model of its own
        assert found["devices"]["judge"]["evaluated"] == 1199
        with_an_old_one = status.read_ledger(many, 20, also=[7])
        assert with_an_old_one["versions"] == [everything["versions"][7], *found["versions"]]


def test_a_status_of_old_versions_has_the_newest_metrics_of_all(tmp_path: Path) -> None:
    with closing(federation(tmp_path / "ledger", 30)) as made:
        made.db.execute("DELETE FROM metrics WHERE version > 3")
        found = status.read_ledger(made, 20)
        assert (found["metric"], found["better"], found["local"]["newest"]) == (
            "error",
            {"error": LOWER, "loss": LOWER},
            3,
        )
        assert json.dumps(metric_rows.tests(made).version(3)["metrics"]) == json.dumps({"error": 0.5, "loss": 0.1})
