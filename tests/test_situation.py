"""What the core knows beside its ledger, saved for those who look at the status; and the lines of its log."""

from collections.abc import Callable

from support.small_world import Bench, float32_block, saved, ternary_block
from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.situation import Situation
from ternbus.aggregator.shell import examination
from ternbus.aggregator.store import answers
from ternbus.aggregator.store import status as statuses
from ternbus.broker.log_levels import INFO, WARNING

Make = Callable[..., Bench]


def told(bench: Bench, **about: float) -> Situation:
    (record,) = saved(bench.handle(events.CountsRequested(**about)), records.SituationTold)  # type: ignore[arg-type]
    assert isinstance(record, records.SituationTold)
    return record.situation


def logged(bench: Bench) -> list[events.Log]:
    return [action for action in bench.last if isinstance(action, events.Log)]


def test_the_connection_is_known_with_its_times_and_its_fault(make: Make) -> None:
    bench = make(started=False)
    bench.perform(bench.core.start(bench.now))
    bench.now += 5
    found = told(bench)
    assert (found.running_s, found.connected_s, found.lost_s, found.fault) == (5, None, 5, "not connected yet")
    bench.handle(events.ConnectFailed(reason="no broker listens there"))
    bench.now += 1
    assert (told(bench).lost_s, told(bench).fault) == (6, "no broker listens there")
    bench.connect()
    bench.now += 10
    found = told(bench, unacknowledged_s=3.0)
    assert (found.connected_s, found.lost_s, found.fault, found.unacknowledged_s) == (10, None, "", 3.0)
    bench.handle(events.Disconnected(reason="it was lost"))
    bench.now += 2
    assert (told(bench).connected_s, told(bench).lost_s, told(bench).fault) == (None, 2, "it was lost")
    bench.handle(events.ConnectFailed())
    assert (told(bench).lost_s, told(bench).fault) == (2, "it was lost")


def test_whom_a_version_waits_for_is_known_and_who_is_silent(make: Make) -> None:
    bench = make(merge__buffer_size=2, merge__max_wait_s=1e6)
    assert told(bench).waiting.devices == ()
    devices = {name: bench.join(name) for name in ("pi-1", "pi-2", "judge")}
    for name, each in devices.items():
        bench.receive(each.topic("status"), each.status("training"))
        if name == "judge":
            bench.receive(each.topic("metrics"), each.metrics(0, "local"))
    for seed in range(4):
        for device in (devices["pi-1"], devices["pi-2"]):
            bench.send(device, ternary_block(bench.schema, seed), bench.version)
            bench.tick(5.0)
    assert bench.version == 4
    bench.send(devices["pi-1"], ternary_block(bench.schema, 9), bench.version)
    waiting = told(bench).waiting
    assert (waiting.devices, waiting.count, dict(waiting.silent), waiting.for_s) == (("judge", "pi-2"), 2, {}, 0.0)
    bench.tick(60.0)
    waiting = told(bench).waiting
    assert (waiting.devices, waiting.for_s) == (("judge",), 60.0)
    assert waiting.silent.keys() == {"pi-2"}
    assert waiting.silent["pi-2"] >= 60.0


def test_losses_are_kept_over_a_restart_and_hidden_under_dp(make: Make) -> None:
    bench = make()
    pi, other = bench.join("pi"), bench.join("other")
    bench.send(pi, ternary_block(bench.schema, 1), 0, metrics={"loss": 0.25})
    bench.send(other, ternary_block(bench.schema, 2), 0, metrics={"accuracy": 0.5})
    told(bench)
    bench.restart()
    bench.start()
    told(bench)
    found = statuses.read(bench.directory)["devices"]
    assert (found["pi"]["loss"], found["other"]["loss"]) == (0.25, None)
    private = make(plan__dp="device", plan__dp_noise=1.0, plan__dp_clip=1.0, plan__dp_epsilon=9.0)
    device = private.join("pi")
    private.send(device, float32_block(private.schema, 1), 0, metrics={"loss": 0.25})
    assert told(private).losses == {}


def test_the_situation_is_read_back_as_it_was(make: Make) -> None:
    bench = make()
    assert answers.last_situation(bench.ledger.db) is None
    found = told(bench)
    at, read = answers.last_situation(bench.ledger.db) or (0.0, None)
    assert (at, read) == (bench.now, found)
    later = {**found.as_json(), "new": 1, "waiting": {**found.as_json()["waiting"], "new": []}}  # of a later version
    assert Situation.from_json(later) == found


def test_refused_updates_are_counted_by_device_and_logged(make: Make) -> None:
    bench = make(merge__buffer_size=1, staleness__max=0)
    pi, other = bench.join("pi"), bench.join("other")
    bench.send(other, ternary_block(bench.schema, 1), 0)
    assert bench.version == 1
    bench.send(pi, ternary_block(bench.schema, 2), 0)
    (line,) = logged(bench)
    assert (line.level, line.event) == (INFO, "refused")
    assert line.text == "update 2 of pi is stale: base 0 is more than 0 behind 1"
    bench.send(pi, b"nonsense", 1)
    (line,) = logged(bench)
    assert line.level == WARNING
    assert dict(line.fields) | {"reason": ""} == {"device": "pi", "seq": 3, "outcome": "invalid", "reason": ""}
    told(bench)
    row = statuses.read(bench.directory)["devices"]["pi"]
    assert (row["invalid"], row["stale"], row["in_a_row"], row["refused_share"]) == (1, 1, 2, 0.5)
    assert row["answer"]["outcome"] == "invalid"
    assert row["answer"]["at"] == int(bench.now)
    assert "device" not in statuses.read(bench.directory)["counts"]["invalid"]
    assert bench.send(pi, ternary_block(bench.schema, 3), 1)[0].outcome == "accepted"
    told(bench)
    row = statuses.read(bench.directory)["devices"]["pi"]
    assert (row["in_a_row"], row["answer"]["at"], row["stale_share"]) == (0, bench.now, 1 / 3)
    for expected in (1, 2):
        bench.send(pi, b"nonsense", 2)
        told(bench)
        assert statuses.read(bench.directory)["devices"]["pi"]["in_a_row"] == expected
    bench.send(other, ternary_block(bench.schema, 5), 2)
    for _ in range(2):
        bench.send(other, b"nonsense", 3)
    bench.send(pi, b"nonsense", 3)
    told(bench)
    found = statuses.read(bench.directory)["devices"]
    assert (found["other"]["in_a_row"], found["pi"]["in_a_row"]) == (2, 3)


def test_a_duplicate_is_not_a_refusal(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 2), 0)
    assert bench.send(pi, ternary_block(bench.schema, 2), 0)[0].outcome == "duplicate"
    told(bench)
    row = statuses.read(bench.directory)["devices"]["pi"]
    assert (row["invalid"], row["stale"], row["in_a_row"], row["answer"]["outcome"]) == (0, 0, 0, "duplicate")


def test_lines_about_refused_updates_are_bounded(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    lines = 0
    for _ in range(100):
        bench.send(pi, b"nonsense", 0)
        lines += len(logged(bench))
    assert 0 < lines <= bench.core.settings.limits.log_lines_per_minute


def test_a_version_has_a_line_and_many_versions_have_few(make: Make) -> None:
    bench = make(merge__buffer_size=1, downlink__codec="float32")
    pi = bench.join("pi")
    bench.send(pi, float32_block(bench.schema, 1), 0)
    (line,) = logged(bench)
    assert line.text == "version 1: 1 update of 1 device, staleness 0.00, at most 0"
    assert line.fields["digest"] == bench.head.digest.hex()
    assert line.fields["merged"] == [("pi", pi.seq)]
    lines = 1
    for version in range(1, 101):
        bench.send(pi, float32_block(bench.schema, 1), version)
        lines += len(logged(bench))
    assert bench.version == 101
    assert lines == 60


def test_the_newest_versions_are_read(make: Make) -> None:
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    for version in range(3):
        bench.send(pi, ternary_block(bench.schema, version), version)
    found = statuses.read(bench.directory, versions_max=2)["versions"]
    assert [row["version"] for row in found] == [2, 3]


def test_the_examination_of_a_directory_that_nobody_serves_says_so(make: Make) -> None:
    bench = make()
    bench.join("pi")
    found = examination.look(bench.directory)
    assert [each.kind for each in found.health.findings] == ["not-running"]
    assert found.found["health"]["state"] == "down"
