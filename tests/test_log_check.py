"""`ternbus edge verify`: what a device remembers, held against the aggregator's log of merges.

test_kill.py does it with the logs and devices of a federation whose processes were killed.
"""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from ternbus.broker.protocol.identity import Identity, KeyId
from ternbus.broker.protocol.merge_log import FIRST, UNKNOWN_DIGEST, Contribution, Entry, Signed, unpack_all
from ternbus.command import main
from ternbus.edge.core.state import RENUMBERED, UNANSWERED, AnsweredUpdate, OutstandingUpdate, State
from ternbus.edge.shell import log_check
from ternbus.edge.shell.directory import DeviceDirectory, Settings
from ternbus.edge.shell.log_check import LogCheck
from ternbus.edge.store.outbox import Outbox

AGGREGATOR = Identity(b"a" * 32)
KEY, OLD_KEY = KeyId(b"k" * 8), KeyId(b"o" * 8)
SETTINGS = Settings(
    federation="lab",
    device="pi",
    broker="mqtt://127.0.0.1:1",
    aggregator_key=AGGREGATOR.public.hex(),
    task="digits-numpy",
)


def digest(seq: int) -> bytes:
    return blake2b(f"update {seq}".encode(), digest_size=32).digest()


def ours(seq: int, **changes: Any) -> Contribution:
    fields = {"device": "pi", "key": KEY, "seq": seq, "digest": digest(seq), "weight": 10.0, **changes}
    return Contribution(**fields)


THEIRS = Contribution(device="other", key=KeyId(b"x" * 8), seq=1, digest=digest(0), weight=30.0)


def log_of(folder: Path, *merges: list[Contribution], identity: Identity = AGGREGATOR, begins: int = 0) -> Path:
    """The first version, and one for each list of updates of ours; in each of these is one of another device too."""
    entries: list[Signed] = []
    for version, updates in enumerate([None, *merges], begins):
        entry = Entry(
            federation="lab",
            version=version,
            digest=digest(-version),
            previous=entries[-1].hash if entries else FIRST,
            updates=() if updates is None else (THEIRS, *updates),
        )
        entries.append(entry.signed(identity))
    path = folder / "lab.log"
    path.write_bytes(b"".join(entry.pack() for entry in entries))
    return path


def answer(seq: int, version: int, outcome: str = "accepted", **changes: Any) -> AnsweredUpdate:
    fields = {"seq": seq, "base": version, "outcome": outcome, "version": version, "key": KEY, "digest": digest(seq)}
    return AnsweredUpdate(**{**fields, **changes})


def seen(version: int = 0, **changes: Any) -> State:
    return State(key=KEY, head_version=version, head_digest=digest(-version), **changes)


def check(log: Path, answers: list[AnsweredUpdate], kept: State | None = None) -> LogCheck:
    return log_check.check(log, SETTINGS, kept or seen(), answers)


def test_each_accepted_update_is_shown_in_its_version_with_its_share(tmp_path: Path) -> None:
    log = log_of(tmp_path, [ours(5)], [], [ours(9, weight=30.0)])
    found = check(log, [answer(9, 2), answer(7, 1, "stale"), answer(5, 0)], seen(3))
    assert (found.faults, found.waiting, found.version) == ([], [], 3)
    assert [(each.seq, each.version, each.weight, each.share) for each in found.merged] == [
        (5, 1, 10.0, 0.25),
        (9, 3, 30.0, 0.5),
    ]


def test_one_accepted_at_the_log_s_end_waits_for_the_next_version(tmp_path: Path) -> None:
    found = check(log_of(tmp_path, [ours(5)]), [answer(5, 0), answer(6, 1)])
    assert (found.faults, found.waiting, len(found.merged)) == ([], [6], 1)


def test_an_accepted_update_that_no_version_holds_is_a_fault(tmp_path: Path) -> None:
    found = check(log_of(tmp_path, [], []), [answer(5, 0)])
    assert found.faults == ["update 5 on version 0 was accepted at version 0, but is in no later version"]


def test_versions_without_updates_break_no_promise(tmp_path: Path) -> None:
    """As after a restore: nothing was merged there."""
    first = Entry(federation="lab", version=0, digest=digest(0), previous=FIRST).signed(AGGREGATOR)
    leap = Entry(federation="lab", version=2**32, digest=digest(0), previous=first.hash).signed(AGGREGATOR)
    (tmp_path / "lab.log").write_bytes(first.pack() + leap.pack())
    found = check(tmp_path / "lab.log", [answer(5, 0)])
    assert (found.faults, found.waiting) == ([], [5])


def test_what_waited_at_a_rollback_was_dropped_and_what_was_to_be_merged_before_it_is_missed(tmp_path: Path) -> None:
    log = log_of(tmp_path, [ours(5)], [])
    entries = [*unpack_all([log.read_bytes()])]
    for version, updates, rollback in ((35, (), 1), (36, (THEIRS,), None)):
        entry = Entry(
            federation="lab",
            version=version,
            digest=digest(-1 if rollback else -version),
            previous=entries[-1].hash,
            updates=updates,
            rollback=rollback,
        )
        entries.append(entry.signed(AGGREGATOR))
    log.write_bytes(b"".join(entry.pack() for entry in entries))
    found = check(log, [answer(5, 0), answer(6, 1), answer(7, 2), answer(8, 35)])
    assert [(each.seq, each.version) for each in found.dropped] == [(7, 35)]
    assert "1 more were dropped, as the log says: 1 rollback" in found.report("pi")
    assert found.faults == [
        f"update {seq} on version {at} was accepted at version {at}, but is in no later version"
        for seq, at in ((6, 1), (8, 35))
    ]


@pytest.mark.parametrize(
    ("merges", "expected"),
    [
        ([[ours(5)], [ours(5)]], "update 5 on version 0 was merged more than once: in versions 1 and 2"),
        (
            [[ours(5, digest=bytes(32))]],
            "update 5 on version 0 is in version 1, but its digest differs from what was sent",
        ),
        ([[ours(5)], [ours(6)]], "version 2 has update 6, which this device did not send"),
    ],
)
def test_what_the_aggregator_made_of_it_otherwise_is_a_fault(
    tmp_path: Path, merges: list[list[Contribution]], expected: str
) -> None:
    assert check(log_of(tmp_path, *merges), [answer(5, 0)]).faults == [expected]


def test_what_was_accepted_before_the_log_begins_cannot_be_checked(tmp_path: Path) -> None:
    """The aggregator's ledger was migrated at version 5, with update 7 in the buffer."""
    log = log_of(tmp_path, [ours(7, digest=UNKNOWN_DIGEST)], [ours(8)], begins=5)
    found = check(log, [answer(6, 4), answer(7, 5), answer(8, 6)], seen(7))
    assert (found.faults, found.unlogged, found.unknown_bytes) == ([], [6], [7])
    assert [each.seq for each in found.merged] == [7, 8]
    report = found.report("pi")
    assert "pi: 1 accepted updates are in the log as sent" in report
    assert "1 more were accepted before the aggregator kept a log" in report
    assert "whether they are there as they were sent cannot be checked" in report


def test_what_was_accepted_after_the_log_begins_has_to_be_in_it_as_it_was_sent(tmp_path: Path) -> None:
    log = log_of(tmp_path, [], [ours(8, digest=UNKNOWN_DIGEST)], begins=5)
    assert check(log, [answer(7, 5), answer(8, 6)], seen(7)).faults == [
        "update 7 on version 5 was accepted at version 5, but is in no later version",
        "update 8 on version 6 is in version 7, but its digest differs from what was sent",
    ]


def test_a_receipt_that_kept_no_digest_says_less(tmp_path: Path) -> None:
    found = check(log_of(tmp_path, [ours(5)]), [answer(5, 0, digest=b"")], seen(1))
    assert (found.faults, found.unknown_bytes) == ([], [5])


def test_an_update_whose_receipt_was_lost_is_known(tmp_path: Path) -> None:
    """It has no answer yet; or it was given another number, which was answered ``duplicate``; or it was given up."""
    log = log_of(tmp_path, [ours(5)])
    waiting = OutstandingUpdate(
        seq=5, base=0, samples=1, metrics={}, codec="float32", encoding="raw", encoded=b"body", frame_bytes=9000
    )
    assert check(log, [], seen(outstanding=waiting)).faults == []
    assert check(log, [answer(5, 0, RENUMBERED), answer(8, 1, "duplicate")]).faults == []
    assert check(log, [answer(5, 0, UNANSWERED)]).faults == []
    assert len(check(log, [answer(5, 0, RENUMBERED, digest=bytes(32))]).faults) == 1
    assert len(check(log, []).faults) == 1


def test_updates_under_keys_of_before_are_counted_only(tmp_path: Path) -> None:
    found = check(log_of(tmp_path, [ours(5, key=OLD_KEY)]), [])
    assert (found.faults, found.other_keys) == ([], 1)


def test_a_log_that_lacks_or_changes_what_the_device_saw_is_a_fault(tmp_path: Path) -> None:
    log = log_of(tmp_path, [ours(5)])
    assert check(log, [answer(5, 0)], seen(1)).faults == []
    assert "its end was removed" in check(log, [answer(5, 0)], seen(2)).faults[0]
    other = State(key=KEY, head_version=1, head_digest=bytes(32))
    assert check(log, [answer(5, 0)], other).faults == ["version 1 was published with another digest than in the log"]


def test_a_log_that_is_not_the_aggregator_s_proves_nothing(tmp_path: Path) -> None:
    found = check(log_of(tmp_path, [ours(5)], identity=Identity(b"b" * 32)), [answer(5, 0)])
    assert found.merged == []
    assert len(found.faults) == 2
    (tmp_path / "lab.log").write_bytes(b"nonsense")
    assert check(tmp_path / "lab.log", []).faults[0].startswith("no valid entry at byte 0")


def test_the_command_reads_the_device_s_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pi"
    folder.mkdir(mode=0o700)
    DeviceDirectory(folder).write(SETTINGS)
    with Outbox(folder, KEY) as store:
        for seq in range(2, 14):
            store.save(seen(seq - 1), answer(seq, seq - 2), {})

    def verify(log: Path, *more: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["edge", "verify", str(folder), str(log), *more])
        return int(ended.value.code or 0), capsys.readouterr().out

    log = log_of(tmp_path, *([ours(seq)] for seq in range(2, 14)))
    code, printed = verify(log)
    assert code == 0
    assert printed.startswith("pi: 12 accepted updates are in the log as sent, 0 are not merged yet; ")
    assert "  update 13 on version 11: in version 12 with weight 10, 25.0 % of it\n  (the last 10; --json" in printed
    code, printed = verify(log, "--json")
    assert (code, len(json.loads(printed)["merged"])) == (0, 12)
    log = log_of(tmp_path, *([ours(seq)] for seq in range(2, 13)), [])
    code, printed = verify(log)
    assert (code, printed.splitlines()[0]) == (
        1,
        "fault: update 13 on version 11 was accepted at version 11, but is in no later version",
    )
