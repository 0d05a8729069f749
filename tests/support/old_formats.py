"""The folders in tests/fixtures/formats: one of every format that an aggregator or a device ever had."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from ternbus.aggregator.store import control
from ternbus.aggregator.store.ledger import Ledger

FIXTURES = Path(__file__).parents[1] / "fixtures" / "formats"
LEDGER = "ledger.sqlite"
AGGREGATORS = sorted(path.name for path in FIXTURES.glob("aggregator-*"))
OLD_AGGREGATORS = [name for name in AGGREGATORS if name.startswith("aggregator-1")]
DEVICES = sorted(path.name for path in FIXTURES.glob("edge-*"))
OLD_DEVICES = [name for name in DEVICES if name.startswith("edge-first")]
JOINED = [name for name in DEVICES if not name.endswith(("-joining", "-empty"))]


def copy_of(name: str, folder: Path) -> Path:
    """A fixture, with the modes that git does not keep."""
    copied = folder / name
    shutil.copytree(FIXTURES / name, copied)
    for path in copied.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return copied


def expected(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIXTURES / name / "expected.json").read_text())
    return found


def expected_aggregator(name: str) -> dict[str, Any]:
    """What an aggregator has; versions that are only made now have the digests of exact sums."""
    found: dict[str, Any] = expected(name)["aggregator"]
    for version, digest in json.loads((FIXTURES / "exact_sums.json").read_text())[name].items():
        found[version]["digest"] = digest
    return found


def opened(home: Path) -> Ledger:
    """As a process that is to serve the directory opens it."""
    with control.exclusive(home):
        return Ledger(home / LEDGER)


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as db:
        return list(db.iterdump())
