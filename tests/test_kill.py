"""SIGKILL of aggregator, broker and a device, each in turn, in a federation of real processes: the guarantees hold."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.commands import printed
from ternbus.broker.server.running import Engine, choose
from ternbus.edge.store import outbox

pytestmark = pytest.mark.slow

DEVICES = 3
VERSIONS = 22
SCENARIO = f"""
task = "digits-numpy"
devices = {DEVICES}
[speeds]
median_s = 0.3
[aggregator.merge]
buffer_size = 2
[end]
versions = {VERSIONS}
[[fault]]
kill = "aggregator"
after_version = 3
[[fault]]
kill = "broker"
after_version = 7
[[fault]]
kill = "device:1"
after_version = 12
restart_after_s = 0.5
[[fault]]
kill = "aggregator"
after_version = 16
restart_after_s = 0
"""


@pytest.fixture(params=[Engine.MOSQUITTO, Engine.NATS], ids=str, scope="module")
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run in which everything was killed once, and what the run printed."""
    engine: Engine = request.param
    choose(engine)
    folder = tmp_path_factory.mktemp(str(engine))
    (folder / "scenario.toml").write_text(SCENARIO)
    done = subprocess.run(
        [sys.executable, "-m", "ternbus", "lab", "run", "scenario.toml", "--out", "out", "--engine", str(engine)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out", done.stdout


def rows(ledger: Path, query: str) -> list[tuple[Any, ...]]:
    db = sqlite3.connect(ledger)
    try:
        return db.execute(query).fetchall()
    finally:
        db.close()


def test_each_was_killed_and_came_back_and_the_run_went_on_to_its_end(killed: tuple[Path, str]) -> None:
    out, said = killed
    for name in ("aggregator", "broker", "device-1"):
        assert f"killing {name}" in said
        assert f"{name} was restarted" in said
    assert "the run ended before" not in said
    assert (
        "Shutdown" not in (out / "broker" / "broker.log.1").read_text()
    )  # as nats-server says when it is asked to end
    report = json.loads((out / "report.json").read_text())
    assert report["versions"][-1]["version"] >= VERSIONS
    assert report["versions"][-1]["accuracy"] > 0.8


def test_every_accepted_receipt_is_merged_exactly_once(killed: tuple[Path, str]) -> None:
    out, _ = killed
    ledger = out / "aggregator" / "ledger.sqlite"
    merged = rows(ledger, "SELECT device, key, seq, base, merged FROM updates")
    held = [
        (f"device-{index}", bytes(answer.key), answer.seq, answer.base)
        for index in range(DEVICES)
        for answer in outbox.answers(out / "devices" / f"device-{index}")
        if answer.outcome == "accepted"
    ]
    assert len(held) >= VERSIONS
    for receipt in held:
        versions = [row[-1] for row in merged if row[:-1] == receipt]
        assert len(versions) == 1, receipt
        assert versions[0] is not None, receipt


def test_the_versions_count_each_update_once(killed: tuple[Path, str]) -> None:
    """Of an update whose receipt a device never saw the ledger has one row too, for it was sent again."""
    out, _ = killed
    ledger = out / "aggregator" / "ledger.sqlite"
    by_update = rows(ledger, "SELECT merged, count(*) FROM updates WHERE merged IS NOT NULL GROUP BY merged")
    by_version = rows(ledger, "SELECT version, updates FROM versions WHERE updates > 0 ORDER BY version")
    assert sorted(by_update) == by_version
    assert [version for version, _ in by_version] == list(range(1, len(by_version) + 1))
    assert rows(ledger, "SELECT 1 FROM updates GROUP BY device, base HAVING count(*) > 1") == []
    assert rows(ledger, "SELECT 1 FROM updates GROUP BY device, key, seq HAVING count(*) > 1") == []


def test_the_log_shows_each_device_its_updates(killed: tuple[Path, str]) -> None:
    """Exported, and checked by others than who wrote it."""
    out, _ = killed
    exported = printed(out, "aggregator", "log", "export", "aggregator", "lab.log")
    assert "check it with" in exported
    facts = json.loads(printed(out, "aggregator", "log", "verify", "aggregator", "--json"))
    merged = rows(out / "aggregator" / "ledger.sqlite", "SELECT count(*) FROM updates WHERE merged IS NOT NULL")
    assert (facts["ok"], facts["updates"]) == (True, merged[0][0])
    shown = 0
    for index in range(DEVICES):
        folder = out / "devices" / f"device-{index}"
        found = json.loads(printed(out, "edge", "verify", folder, "lab.log", "--json"))
        accepted = [answer for answer in outbox.answers(folder) if answer.outcome == "accepted"]
        assert (found["ok"], len(found["merged"]), found["waiting"]) == (True, len(accepted), [])
        shown += len(found["merged"])
    assert shown >= VERSIONS
