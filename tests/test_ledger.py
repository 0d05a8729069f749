"""The aggregator's disk: all or nothing, readable by its owner only, and by others' processes while it is written."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.small_world import LAB, Bench, Device, accepted_update, float32_block, make_directory, ternary_block
from ternbus.aggregator.core import records
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import status as statuses
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.aggregator.store.rows import signed, unsigned
from ternbus.broker.errors import ConfigError, CorruptError, StorageError
from ternbus.broker.protocol.messages import Metrics, Status


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(make_directory(tmp_path / "aggregator", merge__buffer_size=2, downlink__slots=4))
    made.start()
    yield made
    made.close()


def accepted(device: str, base: int, seq: int = 1) -> records.UpdateAccepted:
    return records.UpdateAccepted(update=accepted_update(device, base=base, seq=seq), body=b"body")


def count(ledger: Ledger, table: str) -> int:
    return int(ledger.db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


@pytest.mark.parametrize("number", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_numbers_of_64_bits_fit(number: int) -> None:
    assert unsigned(signed(number)) == number
    assert -(2**63) <= signed(number) < 2**63


def test_the_largest_seq_is_kept(bench: Bench) -> None:
    pi = bench.join("pi")
    highest = 2**62
    assert bench.send(pi, ternary_block(bench.schema, 1), 0, seq=highest)[0].outcome == "accepted"
    bench.restart()
    bench.start()
    (receipt,) = bench.send(pi, ternary_block(bench.schema, 1), 1, seq=5)
    assert (receipt.outcome, receipt.highest_seq) == ("duplicate", highest)
    found = statuses.read(bench.directory)
    assert found["devices"]["pi"]["last_seq"] == highest


def test_the_directory_is_its_owner_s(bench: Bench) -> None:
    assert (bench.directory / LEDGER).stat().st_mode & 0o077 == 0
    assert (bench.directory / administration.KEY).stat().st_mode & 0o077 == 0


def test_records_are_written_all_or_none(bench: Bench) -> None:
    ledger = bench.ledger
    before = ledger.fact("seq")
    with pytest.raises(sqlite3.IntegrityError):
        ledger.write([records.SeqReserved(upto=before + 5), accepted("pi", 0), accepted("pi", 0)])
    assert ledger.fact("seq") == before
    assert count(ledger, "updates") == 0
    ledger.write([records.SeqReserved(upto=before + 5), accepted("pi", 0), accepted("pi", 1), accepted("other", 0)])
    assert (ledger.fact("seq"), count(ledger, "updates")) == (before + 5, 3)


def test_what_was_not_committed_is_gone_after_a_kill(bench: Bench) -> None:
    """A process dies in the middle of a transaction; the next finds the state before it."""
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from ternbus.aggregator.core import records\n"
        "from ternbus.aggregator.store.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "ledger.write([records.SeqReserved(upto=77_777)])\n"
        "ledger.db.execute('BEGIN IMMEDIATE')\n"
        "ledger._write(records.SeqReserved(upto=99_999), 0.0)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    bench.close()
    path = bench.directory / LEDGER
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run([sys.executable, "-c", code, path], cwd=root, check=False, timeout=60)
    assert done.returncode == -9
    bench.recover()
    assert bench.ledger.fact("seq") == 77_777


def test_vectors_that_a_full_disk_takes_a_part_of_are_an_error(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from ternbus.aggregator.store.vectors import Vectors\n"
        "from ternbus.broker.errors import StorageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    Vectors(Path(sys.argv[1])).write('1-model', [np.zeros(272, np.float32)])\n"
        "except StorageError:\n"
        "    sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "vectors"], check=False, timeout=60).returncode == 7


def test_the_status_is_read_beside_a_writer(bench: Bench) -> None:
    bench.send(bench.join("pi"), ternary_block(bench.schema, 1), 0)
    with bench.ledger.transaction():
        bench.ledger._write(accepted("late", 3), 0.0)
        found = statuses.read(bench.directory)
    assert (found["counts"]["accepted"], found["buffer"]) == (1, 1)
    assert statuses.read(bench.directory)["counts"]["accepted"] == 2


def test_another_connection_s_commit_is_noticed(bench: Bench) -> None:
    before = bench.ledger.change_count()
    assert bench.ledger.change_count() == before
    bench.ledger.write([records.SeqReserved(upto=123_456)])
    assert bench.ledger.change_count() == before
    other = Ledger(bench.directory / LEDGER)
    other.write([records.SeqReserved(upto=123_457)])
    other.close()
    assert bench.ledger.change_count() != before


def test_a_reader_cannot_write(bench: Bench) -> None:
    reader = Ledger(bench.directory / LEDGER, read_only=True)
    with pytest.raises(StorageError):
        reader.write([records.SeqReserved(upto=1)])
    reader.close()


def test_it_is_on_stable_storage_after_every_commit(bench: Bench) -> None:
    assert bench.ledger.db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
    assert bench.ledger.db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ternbus aggregator init"):
        Ledger(tmp_path / "ledger.sqlite")
    (tmp_path / "ledger.sqlite").write_bytes(b"nonsense" * 1000)
    with pytest.raises(CorruptError, match=r"cannot read .*; run `ternbus aggregator check .*restore it from a backup"):
        Ledger(tmp_path / "ledger.sqlite")
    (tmp_path / "ledger.sqlite").write_bytes(b"")
    with pytest.raises(CorruptError, match=r"cannot read .*; run `ternbus aggregator check .*restore it from a backup"):
        Ledger(tmp_path / "ledger.sqlite")


def test_a_ledger_of_another_format_is_refused(bench: Bench) -> None:
    bench.ledger.db.execute("UPDATE facts SET value = 99 WHERE name = 'format'")
    with pytest.raises(ConfigError, match="has format 99"):
        Ledger(bench.directory / LEDGER)


def test_bodies_that_nobody_needs_any_more_are_pruned(bench: Bench) -> None:
    """Updates' after the snapshot that holds them; versions' and vectors' beyond the last D versions."""
    pi, other = bench.join("pi"), bench.join("other")
    for version in range(20):
        for device in (pi, other):
            bench.send(device, float32_block(bench.schema, version), version)
    bench.ledger.write([])  # builds on the vectors that were written beside
    bench.beside.work()
    ledger, named = bench.ledger, bench.head.snapshot.version
    assert bench.version == 20
    unmerged = ledger.db.execute("SELECT count(*) FROM updates WHERE segment IS NOT NULL AND merged <= ?", (named,))
    assert unmerged.fetchone() == (0,)
    assert count(ledger, "updates") == 40
    assert len(list((bench.directory / "bodies").iterdir())) <= 1
    assert count(ledger, "versions") == 21
    bodies = ledger.db.execute("SELECT min(version), count(*) FROM versions WHERE body IS NOT NULL").fetchone()
    assert bodies[0] >= 20 - 2 * 4
    assert count(ledger, "snapshots") <= 4
    assert count(ledger, "frames") <= 2 * 2 + 4 + 1  # places, slots, head; each in one part


def test_the_last_versions_can_be_exported_and_older_ones_not(bench: Bench) -> None:
    pi, other = bench.join("pi"), bench.join("other")
    digests = {0: bench.core.model.digest}
    for version in range(11):
        for device in (pi, other):
            bench.send(device, float32_block(bench.schema, version), version)
        digests[version + 1] = bench.core.model.digest
        for kept in range(max(0, version + 2 - 4), version + 2):  # D = 4
            number, digest, tensors = administration.tensors_of(bench.directory, kept)
            assert (number, digest) == (kept, digests[kept])
            assert tensors["w"].shape == (16, 40)
    assert administration.tensors_of(bench.directory, None)[0] == 11
    for gone in (0, 3, 12, -1):
        with pytest.raises(ConfigError, match="kept are"):
            administration.tensors_of(bench.directory, gone)


def test_a_damaged_delta_is_noticed(bench: Bench) -> None:
    pi, other = bench.join("pi"), bench.join("other")
    for device in (pi, other):
        bench.send(device, float32_block(bench.schema, 1), 0)
    digest = bytes(32)
    bench.ledger.db.execute("UPDATE versions SET digest = ? WHERE version = 1", (digest,))
    with pytest.raises(CorruptError, match="version 1 does not have its digest"):
        administration.tensors_of(bench.directory, 1)
    with pytest.raises(CorruptError, match="versions 1 is not as it was written"):
        bench.restart()


def test_a_message_that_is_none_any_more_is_a_damage_and_no_peer_s_fault(bench: Bench) -> None:
    for device in (bench.join("pi"), bench.join("other")):
        bench.send(device, float32_block(bench.schema, 1), 0)
    bench.ledger.db.execute("UPDATE versions SET body = x'00' WHERE version = 1")
    with pytest.raises(CorruptError, match="ternbus aggregator repair"):
        administration.open_core(bench.directory, bench.ledger, "test")


def test_the_status_counts_what_happened(bench: Bench) -> None:
    pi, other = bench.join("pi"), bench.join("other")
    judge = bench.join("judge", evaluator=True)
    for device in (pi, other):
        bench.receive(device.topic("status"), device.status("training", base=0))
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    bench.send(other, ternary_block(bench.schema, 2), 0)
    bench.send(other, ternary_block(bench.schema, 3), 0)
    bench.send(other, b"nonsense", 1)
    bench.send(pi, ternary_block(bench.schema, 4), 1)
    bench.receive(judge.topic("metrics"), judge.metrics(1, accuracy=0.75))
    bench.receive(judge.topic("metrics"), judge.metrics(1, "local", accuracy=0.1))
    bench.receive(pi.topic("update"), b"nonsense", b"TBF1 and so on" + bytes(100))
    bench.tick(1.0)
    found = statuses.read(bench.directory)
    assert set(found) == {
        "federation",
        "version",
        "digest",
        "state",
        "buffer",
        "candidate",
        "disk",
        "counts",
        "metric",
        "better",
        "local",
        "claim",
        "search",
        "devices",
        "versions",
    }
    assert (found["federation"], found["version"], found["state"], found["buffer"]) == (LAB, 1, "open", 1)
    assert found["digest"] == bench.core.model.digest.hex()
    assert found["counts"] == {
        "accepted": 3,
        "merged": 2,
        "dropped": 0,
        "unmerged": 0,
        "stale": 0,
        "duplicate": 1,
        "busy": 0,
        "bounded": 0,
        "invalid": {"bad-length": 1, "header-too-long": 1, "not-a-frame": 1},
    }
    about = found["devices"]["pi"]
    assert (about["state"], about["training_on"], about["updates"]) == ("training", 0, 2)
    assert (about["last_seq"], about["base"], about["staleness"]) == (pi.seq, 1, 0)
    assert about["bytes"] > 400
    assert found["devices"]["judge"]["base"] is None
    zero, one = found["versions"]
    assert (zero["version"], zero["updates"], zero["metrics"]) == (0, 0, {})
    assert (one["version"], one["updates"], one["metrics"]) == (1, 2, {"accuracy": 0.75})
    assert (one["digest"], one["staleness_mean"], one["staleness_max"]) == (found["digest"], 0.0, 0)


def test_why_a_device_fails_is_kept_until_it_says_otherwise(bench: Bench) -> None:
    pi, other = bench.join("pi"), bench.join("other")
    reason = "missing data: /srv/data: No such file or directory"

    def shown(device: Device, **about: Any) -> str | None:
        status = Status(session=1, **about)
        bench.receive(device.topic("status"), device.frame("status", status.meta()))
        bench.tick(1.0)
        bench.restart()
        bench.start()
        found: str | None = statuses.read(bench.directory)["devices"][device.name]["failing"]
        return found

    assert shown(pi, state="idle", failing=reason) == reason
    assert shown(other, state="idle", failing="another reason") == "another reason"
    assert shown(pi, state="training", failing=reason) == reason
    assert shown(pi, state="idle") is None
    assert statuses.read(bench.directory)["devices"]["other"]["failing"] == "another reason"
    assert shown(other, state="offline") is None


def test_the_largest_hints_of_a_device_are_kept(bench: Bench) -> None:
    pi = bench.join("pi", evaluator=True)
    frame = pi.frame("status", Status(state="idle", session=2**62, base=2**62, software="x" * 500).meta())
    bench.receive(pi.topic("status"), frame)
    bench.receive(
        pi.topic("metrics"),
        pi.frame(
            "metrics",
            Metrics(version=0, samples=2**32 - 1, split="test", values={"accuracy": 1e308, "é": -1e-308}).meta(),
            seq=2**62,
        ),
    )
    bench.tick(1.0)
    about = statuses.read(bench.directory)["devices"]["pi"]
    assert (about["training_on"], about["software"]) == (2**62, "x" * 100)
    assert statuses.read(bench.directory)["versions"][0]["metrics"] == {"accuracy": 1e308, "é": -1e-308}
    bench.restart()
    assert bench.core.registry.members["pi"].metrics_seq == 2**62


def test_vectors_are_little_endian_on_disk(bench: Bench) -> None:
    content = (bench.directory / "vectors" / "1-model.f32").read_bytes()
    assert np.array_equal(np.frombuffer(content, dtype="<f4"), bench.core.model.published)
