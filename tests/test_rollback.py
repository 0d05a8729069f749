"""Back to an earlier model: as a new version that all devices take over bit for bit, and that the log names."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from support.following import Broker, deliver
from support.private_world import HelperSide, PrivateBench, make_private
from support.small_world import Bench, Device, float32_block, follow, initial_model, saved, scratch
from ternbus.aggregator.core import events, records
from ternbus.aggregator.shell import cli, log
from ternbus.aggregator.store import soundness, version_rows
from ternbus.aggregator.store import status as statuses
from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.model_files import save_safetensors
from ternbus.broker.protocol import merge_log
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.merge_log import FIRST, OTHER_MODEL, ROLLBACK_MAX, Audit, Contribution, Entry, Signed
from ternbus.broker.protocol.schema import to_vector, vector_digest
from ternbus.edge.core.follower import Follower

Make = Callable[..., Bench]
RUN = CliRunner()
SLOTS = 4


@pytest.fixture
def bench(make: Make) -> Bench:
    return make(
        merge__buffer_size=1, downlink__codec="float32", downlink__slots=SLOTS, optimizer__name="fedavgm",
        staleness__max=100,
    )  # fmt: skip


def advanced(bench: Bench, device: Device, count: int) -> list[bytes]:
    """The digests of as many new versions."""
    digests = []
    for _ in range(count):
        bench.send(device, float32_block(bench.schema, bench.version), bench.version)
        digests.append(bench.head.digest)
    return digests


def asked(bench: Bench, *options: object) -> str:
    """Run the command while nobody serves the directory, and begin again from what it has written."""
    bench.beside.work()
    bench.ledger.write([])
    bench.close()
    done = RUN.invoke(cli.app, ["rollback", str(bench.directory), *map(str, options)])
    bench.recover()
    bench.start()
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def audited(bench: Bench) -> Audit:
    return log.verify(bench.directory, None, None)


def test_an_earlier_version_comes_back_bit_for_bit_above_all_that_devices_have_seen(bench: Bench) -> None:
    digests = advanced(bench, bench.join("pi"), 6)
    vector = bench.ledger.vector(4)
    text = asked(bench, "--version", "4")
    assert text == "version 11 is version 4 again; versions up to 6 are withdrawn\n"
    assert (bench.version, bench.head.digest) == (6 + SLOTS + 1, digests[3])
    assert follow(bench.retained, bench.identity.public) == (11, digests[3])
    assert bench.core.model.published.tobytes() == vector.tobytes()
    assert audited(bench).faults == []
    (entry,) = [entry for entry, _ in log.entries(bench.directory, 11)]
    assert (entry.rollback, entry.updates) == (4, ())
    assert (bench.core.model.server.target == vector).all()
    momentum = bench.core.model.server.momentum
    assert momentum is not None
    assert not momentum.any()


def test_a_rollback_leaves_the_versions_before_it_to_go_back_to(bench: Bench) -> None:
    digests = advanced(bench, bench.join("pi"), 6)
    asked(bench, "--version", "5")
    assert asked(bench, "--version", "4") == "version 16 is version 4 again; versions up to 11 are withdrawn\n"
    assert bench.head.digest == digests[3]
    assert list(soundness.faults(bench.ledger, bench.identity.public)) == []
    rows = version_rows.read(bench.ledger, 20)["versions"]
    assert [row["version"] for row in rows if row["kept"]] == [4, 5, 6, 11, 16]  # four, from the snapshot before them


def test_a_device_that_follows_holds_the_earlier_model_and_goes_on_from_it(bench: Bench) -> None:
    pi = bench.join("pi")
    follower, broker = Follower(federation="lab"), Broker(retained=bench.retained)
    broker.perform(follower, follower.reconnected(0.0), 0.0)

    def hear() -> None:
        broker.retained = bench.retained
        deltas = [(topic, payload) for topic, payload in bench.retained.items() if "/delta/" in topic]
        broker.perform(follower, [*deliver(follower, deltas), *follower.head_accepted(bench.head, 0.0)], 0.0)

    advanced(bench, pi, 6)
    hear()
    wanted = bench.ledger.vector(3)
    asked(bench, "--version", "3")
    hear()
    assert (follower.version, follower.synced) == (11, True)
    assert follower.vector is not None
    assert follower.vector.tobytes() == wanted.tobytes()
    advanced(bench, pi, 3)
    hear()
    assert follower.version == 14
    assert follower.vector.tobytes() == bench.core.model.published.tobytes()


def test_updates_on_withdrawn_versions_are_stale_whatever_the_bound_after_a_restart_too(bench: Bench) -> None:
    pi, other = bench.join("pi"), bench.join("other")
    advanced(bench, pi, 6)
    asked(bench, "--version", "4")
    for _ in range(2):
        (receipt,) = bench.send(other, float32_block(bench.schema, 1), 6)
        assert (receipt.outcome, receipt.reason) == ("stale", "version 6 was withdrawn")
        bench.restart()
        bench.start()
    assert bench.send(other, float32_block(bench.schema, 1), 11)[0].outcome == "accepted"
    assert bench.version == 12
    assert audited(bench).faults == []


def test_updates_that_wait_are_dropped_and_never_merged(make: Make) -> None:
    bench = make(merge__buffer_size=2, downlink__codec="float32", downlink__slots=SLOTS)
    pi, other = bench.join("pi"), bench.join("other")
    bench.send(pi, float32_block(bench.schema, 1), 0)
    bench.send(other, float32_block(bench.schema, 2), 0)
    assert bench.version == 1
    bench.send(pi, float32_block(bench.schema, 3), 1)
    event = events.RollbackRequested(to=0, vector=bench.ledger.vector(0), request=7)
    actions = bench.handle(event)
    assert saved(actions, records.RequestDone) == [records.RequestDone(request=7)]
    (line,) = [action for action in actions if isinstance(action, events.Log)]
    assert line.text == "version 6 is version 0 again: versions up to 1 are withdrawn, 1 waiting update dropped"
    found = statuses.read(bench.directory)
    assert (found["buffer"], found["counts"]["dropped"], found["devices"]["pi"]["waits"]) == (0, 1, False)
    assert bench.core.registry.members["pi"].waiting_bytes == 0
    bench.restart()
    bench.start()
    assert bench.core.model.buffer == []
    bench.send(pi, float32_block(bench.schema, 4), 6)
    bench.send(other, float32_block(bench.schema, 5), 6)
    assert bench.version == 7
    assert audited(bench).faults == []


def test_a_crash_at_any_record_of_a_rollback_leaves_the_old_state_or_the_new_one(bench: Bench) -> None:
    """All its records are one transaction; a bench that saves and publishes nothing more begins from them."""
    advanced(bench, bench.join("pi"), 3)
    event = events.RollbackRequested(to=1, vector=bench.ledger.vector(1))
    batch = [action.record for action in bench.core.handle(event, bench.now) if isinstance(action, events.Save)]
    bench.restart()
    assert bench.version == 3
    bench.ledger.write(batch, now=bench.now)
    bench.restart()
    bench.start()
    assert (bench.version, follow(bench.retained, bench.identity.public)[0]) == (3 + SLOTS + 1, 8)
    assert audited(bench).faults == []


def test_a_model_of_a_file_comes_back_as_well(bench: Bench, tmp_path: Path) -> None:
    advanced(bench, bench.join("pi"), 2)
    tensors = {name: array + np.float32(0.5) for name, array in initial_model().items()}
    path = tmp_path / "other.safetensors"
    save_safetensors(path, tensors, {})
    text = asked(bench, "--model", path)
    assert text == f"version 7 is the model of {path} again; versions up to 2 are withdrawn\n"
    assert bench.head.digest == vector_digest(to_vector(bench.schema, tensors))
    assert [entry.rollback for entry, _ in log.entries(bench.directory, 7)] == [OTHER_MODEL]
    assert audited(bench).faults == []
    assert not (bench.directory / "rollback.safetensors").exists()


def test_what_cannot_be_had_is_said_and_nothing_changes(bench: Bench, tmp_path: Path) -> None:
    advanced(bench, bench.join("pi"), 2)
    path = tmp_path / "other.safetensors"
    save_safetensors(path, {"w": np.zeros(3, np.float32)}, {})
    wrong: list[tuple[list[object], str]] = [
        (["--version", "9"], "version 9 is not kept; kept are 0 to 2"),
        (["--tag", "none"], "there is no tag 'none'"),
        (["--model", path], "the model lacks tensor"),
        ([], "give one of --version, --tag and --model"),
        (["--version", "1", "--tag", "good"], "give one of"),
    ]
    for options, why in wrong:
        with pytest.raises(ConfigError, match=why):
            asked(bench, *options)
    assert bench.version == 2
    (done,) = saved(bench.handle(events.RollbackRequested(to=9, error="it is gone", request=3)), records.RequestDone)
    assert done == records.RequestDone(request=3, error="it is gone")


def test_a_version_with_a_tag_comes_back_long_after(bench: Bench) -> None:
    pi = bench.join("pi")
    digests = advanced(bench, pi, 2)
    assert RUN.invoke(cli.app, ["tag", str(bench.directory), "2", "good"]).exit_code == 0
    advanced(bench, pi, 10)
    asked(bench, "--tag", "good")
    assert bench.head.digest == digests[1]
    assert audited(bench).faults == []


def test_a_federation_with_private_sums_is_not_rolled_back() -> None:
    bench = PrivateBench(make_private(scratch() / "private", [HelperSide("h-1")]))
    bench.start()
    event = events.RollbackRequested(to=0, vector=bench.ledger.vector(0), request=1)
    (done,) = saved(bench.handle(event), records.RequestDone)
    assert isinstance(done, records.RequestDone)
    assert "a federation with private sums cannot be rolled back" in done.error
    bench.close()


# --- what the check of a log believes


KEY = Identity(b"k" * 32)


@pytest.fixture
def chain() -> list[Signed]:
    signed: list[Signed] = []
    for version in range(3):
        previous = signed[-1].hash if signed else FIRST
        signed.append(
            Entry(federation="lab", version=version, digest=bytes([version] * 32), previous=previous).signed(KEY)
        )
    return signed


def faults(chain: list[Signed], **about: int) -> list[str]:
    """Of the chain with one more entry, that of a rollback."""
    blank = {"version": 8, "rollback": 1, "digest": 1, **about}
    entry = Entry(
        federation="lab", version=blank["version"], digest=bytes([blank["digest"]] * 32), previous=chain[-1].hash,
        rollback=blank["rollback"],
    )  # fmt: skip
    audit = Audit(public=KEY.public, federation="lab")
    for signed in (*chain, entry.signed(KEY)):
        audit.take(signed)
    return audit.finish()


def test_a_rollback_may_leave_versions_out_and_must_have_the_model_that_it_names(chain: list[Signed]) -> None:
    assert faults(chain) == []
    assert faults(chain, rollback=OTHER_MODEL, digest=9) == []
    assert faults(chain, digest=2) == ["version 8 claims to be version 1 again, and is not"]
    assert faults(chain, rollback=5) == ["version 8 claims to be version 5 again, and is not"]
    assert faults(chain, version=2 + ROLLBACK_MAX) == []
    beyond = 3 + ROLLBACK_MAX
    assert faults(chain, version=beyond) == [f"versions 3 to {beyond - 1} are missing"]
    assert faults(chain, version=2 + 2**32, digest=2) == [
        f"version {2 + 2**32} claims to be version 1 again, and is not"
    ]
    assert faults([chain[0], chain[2]]) != []


def test_an_entry_of_a_rollback_has_one_encoding(chain: list[Signed]) -> None:
    entry = Entry(federation="lab", version=8, digest=bytes(32), previous=chain[-1].hash, rollback=1)
    assert Entry.parse(entry.content()) == entry
    with pytest.raises(ProtocolError):
        Entry.parse(replace(entry, rollback=-2).content())
    update = Contribution(device="pi", key=KEY.key_id, seq=1, digest=bytes(32), weight=1.0)
    with pytest.raises(ProtocolError, match="a rollback with updates"):
        Entry.parse(replace(entry, updates=(update,)).content())
    assert merge_log.unpack(entry.signed(KEY).pack()).content == entry.content()
