"""The life cycle of a key: invited, replaced, revoked; limits for each device; and secrets show in no text."""

import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from support.small_world import LAB, Bench, Device, float32_block, preverifier_of, receipts, refusals, saved
from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.registry import Invited
from ternbus.aggregator.shell import administration
from ternbus.aggregator.shell.transport import Credentials as DeviceCredentials
from ternbus.aggregator.store import status as statuses
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.aggregator.store.membership import codes
from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.server.directory import Credentials
from ternbus.edge.core.profile import Profile
from ternbus.edge.shell.directory import Settings

Make = Callable[..., Bench]


def enroll(bench: Bench, device: Device, code: str, clock_s: float = 0.0) -> tuple[str, str]:
    payload = device.enroll(code)
    actions = bench.handle(events.MessageArrived(topic=device.topic("enroll"), payload=payload, clock_s=clock_s))
    (receipt,) = receipts(actions)
    return receipt.outcome, receipt.reason


def errors(actions: list[events.Action]) -> list[str]:
    return [record.error for record in saved(actions, records.RequestDone)]


# --- invitations


def test_an_invitation_ends_at_its_time_by_the_aggregators_clock(make: Make) -> None:
    bench = make()
    code = bench.invite("pi", expires_at=5000.0)
    pi = Device("pi", bench.schema)
    assert enroll(bench, pi, code, 5000.0) == ("refused", "the invitation has expired")
    bench.restart()
    bench.start()
    assert enroll(bench, pi, code, 9999.0)[0] == "refused"
    assert enroll(bench, pi, code, 4999.0)[0] == "enrolled"


def test_a_device_that_has_joined_gets_its_answer_after_the_end_of_its_invitation(make: Make) -> None:
    bench = make()
    code = bench.invite("pi", expires_at=5000.0)
    pi = Device("pi", bench.schema)
    frame = pi.enroll(code)
    for clock_s in (4999.0, 5001.0):
        event = events.MessageArrived(topic=pi.topic("enroll"), payload=frame, clock_s=clock_s)
        assert receipts(bench.handle(event))[0].outcome == "enrolled"


def test_a_spent_code_is_erased_from_the_disk(make: Make) -> None:
    bench = make()
    code = bench.invite("pi", "a-code-that-is-nowhere-else-0123456789")
    assert enroll(bench, Device("pi", bench.schema), code)[0] == "enrolled"
    bench.ledger.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for path in bench.directory.rglob("*"):
        assert not path.is_file() or code.encode() not in path.read_bytes(), path


def test_a_cancelled_invitation_admits_nobody_also_after_a_restart(make: Make) -> None:
    bench = make()
    code = bench.invite("pi")
    assert errors(bench.handle(events.CancelRequested(device="pi", request=1))) == [""]
    pi = Device("pi", bench.schema)
    assert enroll(bench, pi, code)[0] == "refused"
    bench.restart()
    bench.start()
    assert enroll(bench, pi, code)[0] == "refused"
    (error,) = errors(bench.handle(events.CancelRequested(device="pi", request=2)))
    assert "pi has no open invitation" in error


def test_a_new_invitation_voids_the_one_before(make: Make) -> None:
    bench = make()
    old, new = bench.invite("pi", "the-old-code"), bench.invite("pi", "the-new-code")
    pi = Device("pi", bench.schema)
    assert enroll(bench, pi, old)[0] == "refused"
    assert enroll(bench, pi, new)[0] == "enrolled"


def test_invitations_are_listed_without_codes(make: Make) -> None:
    bench = make()
    bench.join("pi")
    now = time.time()
    codes = {name: bench.invite(name, f"code-of-{name}", now + left) for name, left in (("new", 60), ("pi", -60))}
    listed = statuses.invitations(bench.directory, now)
    assert [(row["device"], row["state"], row["key_state"]) for row in listed] == [
        ("new", "open", None),
        ("pi", "expired", "active"),
    ]
    assert not any(code in repr(listed) for code in codes.values())


def test_commands_do_it_themselves_where_nothing_runs(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.send(pi, float32_block(bench.schema, 1), 0)
    before = time.time()
    (invitation,) = administration.invite(bench.directory, "guest", expires_in_s=60.0)
    assert invitation.expires is not None
    assert before + 59 < invitation.expires.timestamp() <= time.time() + 60
    assert f"{invitation.expires:%Y-%m-%d at %H:%M:%S} UTC" in invitation.dumps()
    assert Invitation.loads(invitation.dumps()) == invitation
    with pytest.raises(ConfigError, match="stranger has no open invitation"):
        administration.cancel(bench.directory, "stranger", "test")
    with pytest.raises(ConfigError, match="guest has not joined"):
        administration.revoke(bench.directory, "guest", "test")
    with pytest.raises(ConfigError, match="one line"):
        administration.revoke(bench.directory, "pi", "test", why="a\nb")
    administration.cancel(bench.directory, "guest", "test")
    assert administration.revoke(bench.directory, "pi", "test", why="stolen") == 1
    bench.restart()
    assert (bench.core.registry.codes, bench.core.model.buffer) == ({}, [])
    found = statuses.read(bench.directory)
    assert (found["counts"]["accepted"], found["counts"]["merged"], found["counts"]["dropped"]) == (1, 0, 1)
    assert (found["buffer"], found["devices"]["pi"]["key_state"]) == (0, "revoked")
    assert found["devices"]["pi"]["revoked_why"] == "stolen"


# --- revoked


def test_a_revocation_is_in_force_with_the_next_frame_and_says_why(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    frames = pi.update(float32_block(bench.schema, 1), 0)
    gate = preverifier_of(bench)
    opened = gate.open(pi.topic("update"), frames[0])
    assert opened is not None
    bench.revoke("pi", "lost on the train")
    event = events.MessageArrived(topic=pi.topic("update"), payload=frames[0], opened=opened)
    (receipt,) = receipts(bench.handle(event))
    assert (receipt.outcome, receipt.reason) == ("revoked", "lost on the train")
    assert bench.core.model.buffer == []
    assert gate.open(pi.topic("update"), frames[0]) is None


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_what_a_revoked_device_has_in_the_buffer_is_dropped_to_the_bit(make: Make, rule: str) -> None:
    """As if it had never come; and the same after a restart, before and after the merge."""
    bench, twin = (make(merge__buffer_size=4, merge__rule=rule, downlink__codec="float32") for _ in range(2))
    for each in (bench, twin):
        devices = {name: each.join(name) for name in ("a", "b", "c", "d", "bad")}
        for seed, name in enumerate(("a", "bad", "b")):
            if each is bench or name != "bad":
                each.send(devices[name], float32_block(each.schema, seed), 0, samples=10 + seed)
        if each is bench:
            bench.revoke("bad")
            assert [update.device for update in bench.core.model.buffer] == ["a", "b"]
            assert bench.core.registry.members["bad"].waiting_bytes == 0
            bench.restart()
            bench.start()
        for seed, name in ((7, "c"), (8, "d")):
            each.send(devices[name], float32_block(each.schema, seed), 0)
        each.restart()
    assert bench.version == twin.version == 1
    assert bench.core.model.digest == twin.core.model.digest
    assert statuses.read(bench.directory)["counts"]["dropped"] == 1


def test_kept_updates_of_a_revoked_device_are_merged(make: Make) -> None:
    bench = make(merge__buffer_size=2)
    bad, good = bench.join("bad"), bench.join("good")
    bench.send(bad, float32_block(bench.schema, 1), 0)
    bench.revoke("bad", keep=True)
    bench.send(good, float32_block(bench.schema, 2), 0)
    assert bench.version == 1
    assert statuses.read(bench.directory)["counts"] | {"invalid": {}} == {
        "accepted": 2, "merged": 2, "dropped": 0, "unmerged": 0, "stale": 0, "duplicate": 0, "busy": 0,
        "bounded": 0, "invalid": {},
    }  # fmt: skip


def test_an_empty_buffer_is_not_merged_when_its_time_comes(make: Make) -> None:
    bench = make()
    bad = bench.join("bad")
    bench.send(bad, float32_block(bench.schema, 1), 0)
    bench.revoke("bad")
    bench.tick(1000.0)
    assert bench.version == 0
    assert bench.core.deadline is None or bench.core.deadline > bench.now


def test_nobody_waits_for_a_revoked_device(make: Make) -> None:
    bench = make()
    bench.tick(10.0)
    good, bad = bench.join("good"), bench.join("bad")
    for device in (good, bad):
        bench.receive(device.topic("status"), device.status("training"))
    bench.send(good, float32_block(bench.schema, 1), 0)
    assert bench.version == 0
    bench.revoke("bad")
    assert bench.version == 1


def test_parts_of_a_revoked_device_are_forgotten(make: Make) -> None:
    bench = make()
    bad = bench.join("bad")
    parts = bad.update(float32_block(bench.schema, 1), 0, frame_bytes=1500)
    bench.receive(bad.topic("update"), *parts[:-1])
    places = bench.core._updates.places
    assert places.of("bad") is not None
    bench.revoke("bad")
    assert places.of("bad") is None


def test_revoking_again_drops_what_was_kept(make: Make) -> None:
    bench = make()
    bad = bench.join("bad")
    bench.send(bad, float32_block(bench.schema, 1), 0)
    bench.revoke("bad", keep=True)
    assert len(bench.core.model.buffer) == 1
    bench.revoke("bad")
    assert bench.core.model.buffer == []


def test_who_has_not_joined_cannot_be_revoked(make: Make) -> None:
    bench = make()
    (error,) = errors(bench.handle(events.RevokeRequested(device="nobody", request=1)))
    assert "nobody has not joined" in error


@pytest.mark.parametrize("how", ["replaced", "revoked"])
def test_a_key_never_returns(make: Make, how: str) -> None:
    """Not by its first invitation, an open one of before, a new one, under another name, or after a restart."""
    bench = make()
    old = Device("pi", bench.schema)
    first = bench.invite("pi", "the-first-code")
    frame = old.enroll(first)
    bench.receive(old.topic("enroll"), frame)
    open_before = bench.invite("pi", "an-open-code")
    if how == "revoked":
        bench.revoke("pi")
    else:
        new = Device("pi", bench.schema)
        assert enroll(bench, new, open_before)[0] == "enrolled"
    other = Device("other", bench.schema, identity=old.identity)
    for _ in range(2):
        assert receipts(bench.receive(old.topic("enroll"), frame))[0].outcome == "refused"
        assert enroll(bench, old, first)[0] == "refused"
        assert enroll(bench, old, open_before)[0] == "refused"
        assert enroll(bench, Device("pi", bench.schema), open_before)[0] == "refused"
        assert enroll(bench, old, bench.invite("pi", "a-new-code"))[0] == "refused"
        assert enroll(bench, other, bench.invite("other"))[0] == "refused"
        outcomes = {receipt.outcome for receipt in bench.send(old, float32_block(bench.schema, 1), 0)}
        assert outcomes == ({"revoked"} if how == "revoked" else set())
        bench.restart()
        bench.start()
    if how == "revoked":
        assert enroll(bench, Device("pi", bench.schema), "a-new-code")[0] == "enrolled"


def test_a_new_key_does_not_bring_dropped_work_back(make: Make) -> None:
    """(device, base) outlives the key."""
    bench = make()
    bad = bench.join("bad")
    bench.send(bad, float32_block(bench.schema, 1), 0)
    bench.revoke("bad")
    again = bench.join("bad")
    assert bench.send(again, float32_block(bench.schema, 1), 0)[0].outcome == "duplicate"


# --- secrets show nowhere


def test_values_with_secrets_do_not_show_them() -> None:
    identity = Identity.generate()
    code, key = "the-code-of-an-invitation", "-----BEGIN PRIVATE KEY-----"
    about: Any = {"federation": LAB, "device": "pi", "broker": "mqtt://127.0.0.1:1"}
    invited = Invited(code=code)
    about_member: Any = {
        "federation": LAB,
        "device": "pi",
        "aggregator_public": bytes(32),
        "seal": bytes,
        "role": "join",
    }
    values = [
        identity,
        Invitation(**about, aggregator_key="0" * 64, code=code, key=key),
        Settings(**about, aggregator_key="0" * 64, task="digits", code=code),
        invited,
        events.InvitationsRead(codes={"pi": invited}),
        DeviceCredentials(key=key),
        Credentials(authority="a", certificate="c", key=key),
        Profile(**about_member, identity=identity, code=code),
    ]
    for value in values:
        for secret in (code, key, identity.seed.hex(), repr(identity.seed)[2:-1]):
            assert secret not in repr(value), type(value)


def test_errors_about_secrets_do_not_quote_them() -> None:
    code = "a-code-that-is-much-too-long-" * 5
    about: Any = {"federation": LAB, "device": "pi", "broker": "mqtt://127.0.0.1:1", "aggregator_key": "0" * 64}
    texts = ["\n".join(f'{name} = "{value}"' for name, value in {**about, "code": code, **more}.items())
             for more in ({}, {"zz": "x"}, {"code": f'{code[:20]}" ""'}, {"federation": "NO"})]  # fmt: skip
    for text in texts:
        with pytest.raises(ConfigError) as caught:
            Invitation.loads(text)
        shown = "".join(traceback.format_exception(caught.value))
        assert code[:20] not in shown
    with pytest.raises(ConfigError) as wrong:
        Settings.from_table({**about, "code": code}, "edge.toml")
    assert code[:20] not in "".join(traceback.format_exception(wrong.value))


# --- the ledger


def test_two_readers_see_the_same_invitations(make: Make) -> None:
    bench = make()
    bench.invite("pi", "the-code", 77.0)
    ledger = Ledger(bench.directory / LEDGER, read_only=True)
    assert codes(ledger.db) == {"pi": Invited(code="the-code", expires_at=77.0)}
    ledger.close()


# --- bounds


def test_a_flood_is_dropped_before_anything_costly(make: Make) -> None:
    """What exceeds a device's frames is neither parsed nor verified, ahead or here; nobody else is slowed."""
    bench = make()
    bad, good = bench.join("bad"), bench.join("good")
    (frame,) = bad.update(float32_block(bench.schema, 1), 0)
    gate = preverifier_of(bench)
    assert gate.open(bad.topic("update"), frame) is not None
    bench.receive(bad.topic("update"), *[b"nonsense"] * 3000)
    assert gate.open(bad.topic("update"), frame) is None
    assert bench.send(good, float32_block(bench.schema, 1), 0)[0].outcome == "accepted"
    refused = refusals(bench.tick(1.0))
    assert refused == {"not-a-frame": 1000, "too-fast": 2000}


def test_receipts_of_a_device_are_few_and_what_would_need_more_is_not_read(make: Make) -> None:
    bench = make(limits__receipts_per_s=10)
    bad, good = bench.join("bad"), bench.join("good")
    updates = [bad.update(b"nonsense", 0)[0] for _ in range(100)]
    bench.receive(bad.topic("update"), *updates)
    assert len(receipts(bench.last)) == len(saved(bench.last, records.UpdateAnswered)) == 20
    assert receipts(bench.receive(bad.topic("offer"), bad.offer(0, 3))) == []
    assert receipts(bench.receive(bad.topic("update"), updates[19])) == []  # which was answered before
    assert bench.send(good, float32_block(bench.schema, 1), 0)[0].outcome == "accepted"
    bench.now += 1.0
    parts = bad.update(float32_block(bench.schema, 1), 0, frame_bytes=1500)
    assert receipts(bench.receive(bad.topic("update"), *parts))[0].outcome == "accepted"
    bench.receive(bad.topic("update"), *[bad.update(b"nonsense", 0)[0] for _ in range(100)])
    again = bad.update(float32_block(bench.schema, 2), 0, frame_bytes=1500)
    assert receipts(bench.receive(bad.topic("update"), *again)) == []


def test_enrolments_of_a_name_are_few(make: Make) -> None:
    bench = make(limits__enrolments_per_minute=3)
    code = bench.invite("pi")
    pi = Device("pi", bench.schema)
    bench.receive(pi.topic("enroll"), *[pi.enroll("guess") for _ in range(10)])
    assert [receipt.outcome for receipt in receipts(bench.last)] == ["refused"] * 3
    other = Device("other", bench.schema)
    assert enroll(bench, other, bench.invite("other"))[0] == "enrolled"
    assert refusals(bench.tick(20.0)) == {"refused-enroll": 3, "too-many-enrolments": 7}
    assert enroll(bench, pi, code)[0] == "enrolled"


def test_buckets_of_names_that_are_no_longer_invited_are_forgotten(make: Make) -> None:
    bench = make()
    for number in range(20):
        name = f"guest-{number}"
        bench.invite(name)
        bench.receive(Device(name, bench.schema).topic("enroll"), Device(name, bench.schema).enroll("guess"))
        bench.handle(events.CancelRequested(device=name))
    bench.invite("last")
    assert set(bench.core._enrollment._tries) <= {"last"}


def test_updates_of_a_device_that_wait_on_disk_are_bounded(make: Make) -> None:
    """One always fits; further ones are told to come again, and do when there is room."""
    bench = make(merge__buffer_size=100, limits__journal_bytes=0, merge__max_wait_s=30.0)
    other = bench.join("other")
    for version in range(2):
        bench.send(other, float32_block(bench.schema, version), version)
        bench.tick(31.0)
    assert bench.version == 2
    bad = bench.join("bad")
    assert bench.send(bad, float32_block(bench.schema, 5), 0)[0].outcome == "accepted"
    for _ in range(2):
        (receipt,) = bench.send(bad, float32_block(bench.schema, 6), 1)
        assert (receipt.outcome, receipt.reason) == ("busy", "too many updates of this device wait to be merged")
        (again,) = receipts(bench.receive(bad.topic("offer"), bad.offer(1, 4)))
        assert (again.outcome, again.reason) == (receipt.outcome, receipt.reason)
        bench.restart()
        bench.start()
    assert bench.send(other, float32_block(bench.schema, 7), 2)[0].outcome == "accepted"
    bench.tick(31.0)
    assert bench.version == 3
    assert not receipts(bench.receive(bad.topic("offer"), bad.offer(1, 4)))  # but a grant
    assert bench.send(bad, float32_block(bench.schema, 6), 1)[0].outcome == "accepted"


def test_evaluations_of_a_device_are_bounded(make: Make) -> None:
    bench = make(limits__metrics_bytes=1024)
    judge, other = (bench.join(name, evaluator=True) for name in ("judge", "other"))
    for _ in range(2):
        for number in range(100):
            values = {f"{number}-{'x' * 50}": 0.5}
            bench.receive(
                judge.topic("metrics"), judge.metrics(0, "test" if number % 2 else "local", seq=None, **values)
            )
        bench.restart()
        bench.start()
    size = bench.ledger.db.execute("SELECT sum(length(entries)) FROM metrics").fetchone()[0]
    assert 0 < size <= 1024
    bench.receive(other.topic("metrics"), other.metrics(0, accuracy=0.5))
    assert saved(bench.last, records.MetricsReceived)


def test_what_a_device_states_beside_its_evaluations_counts_whenever_it_changes(make: Make) -> None:
    """One row holds it, which would be written again for each message without end."""
    bench = make(limits__metrics_bytes=2**16)
    kept = {"restless": 0, "honest": 0}
    for name in kept:
        device = bench.join(name)
        for number in range(40):
            classes = {f"{each}-{'x' * 200}": number if name == "restless" else 1 for each in range(30)}
            meta = {"version": 0, "samples": 1, "split": "local", "values": {"accuracy": 0.5}, "classes": classes}
            bench.receive(device.topic("metrics"), device.frame("metrics", meta))
            kept[name] += len(saved(bench.last, records.MetricsReceived))
    assert kept["honest"] == 40
    assert 5 < kept["restless"] < 11


def test_log_lines_about_one_reason_are_few_and_say_how_many_were_left_out(make: Make) -> None:
    bench = make(limits__log_lines_per_minute=2)
    pi = bench.join("pi")
    actions = bench.receive(pi.topic("update"), *[b"nonsense"] * 50)
    lines = [action.text for action in actions if isinstance(action, events.Log)]
    assert lines == ["dropped update of pi: not-a-frame: the payload is too short or does not begin with TBF1"] * 2
    bench.receive("ternbus/1/lab/up/pi/upd\nate", b"x")  # another reason has lines of its own
    assert any(isinstance(action, events.Log) and "unknown-topic" in action.text for action in bench.last)
    bench.now += 60.0
    (line, *_) = [each.text for each in bench.receive(pi.topic("update"), b"nonsense") if isinstance(each, events.Log)]
    assert line.endswith("(and 48 more like it)")


def test_a_log_line_is_one_line_whatever_a_peer_writes() -> None:
    error = ProtocolError("unknown-topic", "a\nforged line\x1b[2J")
    assert str(error) == "unknown-topic: a?forged line?[2J"


def test_the_sum_without_a_revoked_device_is_the_sum_of_the_others(make: Make) -> None:
    bench = make()
    devices = {name: bench.join(name) for name in ("a", "bad", "b")}
    blocks = {name: float32_block(bench.schema, seed) for seed, name in enumerate(devices)}
    for name, device in devices.items():
        bench.send(device, blocks[name], 0)
    bench.revoke("bad")
    expected = (blocks["a"].value() + blocks["b"].value()) / 2
    np.testing.assert_allclose(bench.core.model._gathered.result().delta, expected, rtol=1e-6, atol=1e-7)
