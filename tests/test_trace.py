"""The way of an update, by its device and number: on the device, and from its receipt to its version."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support.set_world import World
from support.small_world import Bench, Device, ternary_block
from ternbus.aggregator.core import events
from ternbus.aggregator.shell import administration
from ternbus.aggregator.shell.cli import app
from ternbus.aggregator.store import tracing
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.identity import Identity, KeyId
from ternbus.command import main
from ternbus.edge.core.state import RENUMBERED, UNANSWERED, AnsweredUpdate, OutstandingUpdate, State
from ternbus.edge.shell import update_trace
from ternbus.edge.shell.directory import DeviceDirectory, Settings
from ternbus.edge.store.outbox import Outbox

Make = Callable[..., Bench]
RUN = CliRunner()
KEY, OLD_KEY = KeyId(b"k" * 8), KeyId(b"o" * 8)


def traced(bench: Bench, device: Device, seq: int) -> dict[str, Any]:
    """What the ledger says of the update under the only key of its device."""
    (found,) = tracing.find(bench.ledger, device.name, seq)
    assert (found.pop("key"), found.pop("key_state")) == (device.identity.key_id.hex(), "active")
    return found


def sent(bench: Bench, device: Device, base: int, seed: int = 1) -> int:
    """The number of an update that was accepted."""
    assert bench.send(device, ternary_block(bench.schema, seed), base)[-1].outcome == "accepted"
    return device.seq


def test_an_update_waits_and_is_then_in_a_version_with_its_weight(make: Make) -> None:
    bench = make(merge__buffer_size=2)
    pi, other = bench.join("pi"), bench.join("other")
    seq = sent(bench, pi, 0)
    found = traced(bench, pi, seq)
    assert (found["state"], found["base"], found["staleness"], found["samples"]) == ("waiting", 0, 0, 10)
    assert (found["accepted_at"], found["discount"]) == (bench.now, 1.0)
    bench.send(other, ternary_block(bench.schema, 2), 0, samples=30)
    found = traced(bench, pi, seq)
    assert (found["state"], found["version"], found["made_at"]) == ("merged", 1, bench.now)
    assert found["version_digest"] == bench.head.digest.hex()
    assert found["share"] == pytest.approx(0.25)
    assert found["weight"] > 0


def test_the_last_refused_one_of_a_key_has_its_reason_and_those_before_are_forgotten(make: Make) -> None:
    bench = make(merge__buffer_size=1, staleness__max=0)
    pi = bench.join("pi")
    first = sent(bench, pi, 0)
    bench.send(pi, ternary_block(bench.schema, 2), 0)
    assert bench.send(pi, ternary_block(bench.schema, 3), 0)[0].outcome == "duplicate"
    assert traced(bench, pi, pi.seq)["outcome"] == "duplicate"
    bench.send(pi, b"nonsense", 1)
    found = traced(bench, pi, pi.seq)
    assert (found["state"], found["outcome"], found["reason"].partition(":")[0]) == ("refused", "invalid", "bad-length")
    assert traced(bench, pi, pi.seq - 1) == {"state": "forgotten"}
    assert traced(bench, pi, pi.seq + 1) == {"state": "unknown"}
    assert traced(bench, pi, first)["version"] == 1
    with pytest.raises(ConfigError, match="no device 'nobody' has joined"):
        tracing.find(bench.ledger, "nobody", 1)


def test_one_of_a_withdrawn_candidate_says_what_the_group_measured(make: Make) -> None:
    bench = make(merge__buffer_size=1, canary__group=("judge",), canary__patience_s=20.0)
    pi, _ = bench.join("pi"), bench.join("judge", evaluator=True)
    seq = sent(bench, pi, 0)
    bench.tick(21.0)
    found = traced(bench, pi, seq)
    assert (found["state"], found["reason"]) == ("dropped", "canary: 0 of 1 reports in 20 s")


def test_a_dropped_one_says_whether_its_device_was_revoked_or_its_versions_withdrawn(make: Make) -> None:
    bench = make(merge__buffer_size=2, merge__min_devices=2)
    pi, other = bench.join("pi"), bench.join("other")
    sent(bench, pi, 0)
    sent(bench, other, 0)
    seq = sent(bench, pi, 1)
    bench.revoke("pi")
    kept = sent(bench, other, 1)
    (found,) = tracing.find(bench.ledger, "pi", seq)
    assert (found["state"], found["reason"], found["key_state"]) == ("dropped", "its device was revoked", "revoked")
    bench.handle(events.RollbackRequested(to=0, vector=bench.ledger.vector(0)))
    assert traced(bench, other, kept)["reason"] == "the versions that it was made on were withdrawn"
    (found,) = tracing.find(bench.ledger, "pi", seq)
    assert found["reason"].startswith("its device was revoked, or the versions")


def test_each_key_of_a_device_has_numbers_of_its_own(make: Make) -> None:
    bench = make(merge__buffer_size=1)
    old = bench.join("pi")
    seq = sent(bench, old, 0)
    new = bench.join("pi")
    assert sent(bench, new, 1) == seq
    active, replaced = tracing.find(bench.ledger, "pi", seq)
    assert (active["key_state"], active["base"], active["version"]) == ("active", 1, 2)
    assert (replaced["key_state"], replaced["base"], replaced["version"]) == ("replaced", 0, 1)


def test_an_archived_update_is_found_in_its_archive(make: Make) -> None:
    bench = make(merge__buffer_size=1, staleness__max=1, downlink__slots=2, downlink__codec="float32")
    pi = bench.join("pi")
    numbers = [sent(bench, pi, version, version) for version in range(60)]
    bench.handle(events.StopRequested())
    bench.close()
    assert administration.prune(bench.directory, 1).rows["updates"] > 0
    bench.recover()
    (archived,) = bench.ledger.db.execute("SELECT min(seq) FROM updates").fetchone()
    assert numbers[0] < archived
    found = traced(bench, pi, numbers[0])
    assert (found["state"], found["version"], found["share"]) == ("merged", 1, 1.0)


def test_a_private_update_has_the_weight_of_its_set() -> None:
    world = World("h-1")
    devices = world.begin()
    world.give_all(devices)
    world.settle()
    (found,) = tracing.find(world.ledger, devices[0].name, devices[0].seq)
    assert (found["state"], found["version"], found["share"]) == ("merged", world.version, 1.0)
    assert len(found["set"]) == 64


def test_the_command_is_for_people_and_programs_and_says_by_its_code_that_nothing_is_known(make: Make) -> None:
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    seq = sent(bench, pi, 0)
    done = RUN.invoke(app, ["trace", str(bench.directory), "pi", str(seq)])
    assert done.exit_code == 0
    first, accepted, version, weight = done.stdout.splitlines()
    assert first == f"update {seq} of pi (key {pi.identity.key_id.hex()}): merged"
    assert " on version 0, staleness 0, discount 1, 10 samples, digest " in accepted
    assert version.startswith("  in version 1, made ")
    assert weight.endswith(", 100.0% of it")
    found = json.loads(RUN.invoke(app, ["trace", str(bench.directory), "pi", str(seq), "--json"]).stdout)
    assert (found["device"], found["seq"], found["updates"][0]["version"]) == ("pi", seq, 1)
    unknown = RUN.invoke(app, ["trace", str(bench.directory), "pi", "99"])
    assert (unknown.exit_code, ": unknown; no update with this number" in unknown.stdout) == (1, True)
    bench.send(pi, b"nonsense", 1)
    bench.send(pi, b"nonsense", 1)
    refused = RUN.invoke(app, ["trace", str(bench.directory), "pi", str(pi.seq)])
    assert (refused.exit_code, ": refused; the answer was invalid: " in refused.stdout) == (0, True)
    forgotten = RUN.invoke(app, ["trace", str(bench.directory), "pi", str(pi.seq - 1)])
    assert (forgotten.exit_code, ": forgotten; it was not accepted" in forgotten.stdout) == (1, True)


# --- on the device


def answer(seq: int, base: int, outcome: str = "accepted", key: KeyId = KEY) -> AnsweredUpdate:
    return AnsweredUpdate(seq=seq, base=base, outcome=outcome, version=base + 1, key=key, digest=bytes([seq]) * 32)


def outstanding(seq: int, base: int) -> OutstandingUpdate:
    about: dict[str, Any] = {"codec": "ternary", "encoding": "raw", "encoded": b"", "frame_bytes": 1000}
    return OutstandingUpdate(seq=seq, base=base, samples=1, metrics={}, **about)


def test_a_device_knows_the_receipt_of_each_number_and_of_each_key() -> None:
    answers = [answer(9, 4, "stale"), answer(5, 3), answer(5, 1, key=OLD_KEY)]
    own, former = update_trace.find(State(key=KEY), answers, 5)
    assert (own.key, own.base, own.outcome, own.version, own.digest) == (KEY.hex(), 3, "accepted", 4, "05" * 32)
    assert (former.key, former.base) == (OLD_KEY.hex(), 1)
    assert update_trace.find(State(key=KEY), answers, 6) == []


def test_a_device_knows_what_is_outstanding_and_what_was_sent_with_another_number() -> None:
    state = State(key=KEY, outstanding=outstanding(12, 7))
    (found,) = update_trace.find(state, [], 12)
    assert found.sentence().endswith("was trained on version 7; it has no receipt yet")
    (found,) = update_trace.find(state, [answer(11, 7, RENUMBERED)], 11)
    assert found.sentence().endswith("it was sent again with another number, 12")
    (found,) = update_trace.find(State(key=KEY), [answer(11, 7, UNANSWERED)], 11)
    assert "it had no receipt when the device gave it up" in found.sentence()
    (found,) = update_trace.find(State(key=KEY), [answer(14, 7), answer(11, 7, RENUMBERED)], 11)
    assert found.renumbered == 14
    (found,) = update_trace.find(State(key=KEY), [answer(11, 7, RENUMBERED)], 11)
    assert found.sentence().endswith("with another number")


def test_the_device_s_command_reads_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pi"
    folder.mkdir(mode=0o700)
    key = Identity(b"a" * 32).public.hex()
    about = {"broker": "mqtt://127.0.0.1:1", "aggregator_key": key, "task": "digits-numpy"}
    DeviceDirectory(folder).write(Settings(federation="lab", device="pi", **about))
    with Outbox(folder, KEY) as store:
        store.save(State(key=KEY), answer(5, 3), {})

    def said(seq: int, *more: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["edge", "trace", str(folder), str(seq), *more])
        return int(ended.value.code or 0), capsys.readouterr().out

    text = f"update 5 of pi (key {KEY.hex()}) was trained on version 3; its receipt says accepted, at version 4\n"
    assert said(5) == (0, text)
    code, printed = said(5, "--json")
    assert (code, json.loads(printed)["updates"][0]["outcome"]) == (0, "accepted")
    assert said(6) == (1, "pi has no update 6: other messages have numbers too\n")
