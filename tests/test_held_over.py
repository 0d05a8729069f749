"""`merge.min_devices`: a version is made of the updates of so many devices, or not at all; what waits is kept."""

from collections.abc import Callable

import pytest

from support.small_world import Bench, Device, reconfigure, saved, ternary_block
from ternbus.aggregator.core import events, records
from ternbus.aggregator.store import status as statuses

Make = Callable[..., Bench]


def logged(actions: list[events.Action]) -> list[str]:
    return [action.text for action in actions if isinstance(action, events.Log)]


def sealed(make: Make, **settings: object) -> Bench:
    return make(plan__seal=True, **settings)


def send(bench: Bench, device: Device, seed: int, base: int = 0) -> None:
    (receipt,) = bench.send(device, ternary_block(bench.schema, seed), base, seal_to=bench.identity.public)
    assert receipt.outcome == "accepted"


def online(bench: Bench, *devices: Device) -> None:
    for device in devices:
        bench.receive(device.topic("status"), device.status("training", 1))


def test_a_broker_that_publishes_the_others_last_wills_merges_nobody_alone(make: Make) -> None:
    """Each device signs its will before it connects, and the broker has it: it can publish it at any time."""
    bench = sealed(make)
    bench.tick(5.0)  # the statuses that the broker retains have come
    victim, *others = (bench.join(name) for name in ("victim", "a", "b", "c"))
    wills = [device.status("offline", 1) for device in others]
    online(bench, victim, *others)
    send(bench, victim, 1)
    for device, will in zip(others, wills, strict=True):
        bench.receive(device.topic("status"), will)
    assert list(bench.core.registry.online) == ["victim"]
    assert bench.version == 0
    for _ in range(100):
        bench.tick(10.0)
    assert (bench.version, len(bench.core.model.buffer)) == (0, 1)
    send(bench, others[0], 2)  # a second device: the wait was over long ago
    (made,) = saved(bench.last, records.VersionMade)
    assert (bench.version, made.updates) == (1, 2)


def test_the_same_wills_hasten_a_merge_above_the_number(make: Make) -> None:
    bench = sealed(make)
    bench.tick(5.0)
    devices = [bench.join(name) for name in ("a", "b", "c")]
    will = devices[2].status("offline", 1)
    online(bench, *devices)
    for number, device in enumerate(devices[:2]):
        send(bench, device, number)
    assert bench.version == 0  # presence delays
    bench.receive(devices[2].topic("status"), will)
    assert bench.version == 1


def test_without_seal_a_device_alone_is_merged_as_before(make: Make) -> None:
    bench = make()
    bench.send(bench.join("pi"), ternary_block(bench.schema, 1), 0)
    bench.tick(31.0)
    assert bench.version == 1


@pytest.mark.parametrize("settings", [{"merge__buffer_size": 1}, {"merge__buffer_size": 2}])
def test_a_full_buffer_of_one_device_is_held_over(make: Make, settings: dict[str, object]) -> None:
    bench = make(merge__min_devices=2, **settings)
    pi, other = bench.join("pi"), bench.join("other")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    bench.tick(31.0)
    assert bench.version == 0
    bench.send(other, ternary_block(bench.schema, 2), 0)
    assert bench.version == 1
    # several updates of one device, on several versions, are still of one device
    for base in (0, 1):
        bench.send(Device("pi", bench.schema, pi.identity, pi.seq + 10 * base), ternary_block(bench.schema, 3), base)
    assert (bench.version, len(bench.core.model.buffer)) == (1, 1)


def test_a_new_key_makes_no_second_device(make: Make) -> None:
    bench = make(merge__min_devices=2)
    bench.send(bench.join("pi"), ternary_block(bench.schema, 1), 0)
    bench.handle(events.StateRequested(state="paused"))
    renewed = bench.join("pi")
    assert bench.send(renewed, ternary_block(bench.schema, 2), 0)[0].outcome == "duplicate"
    bench.tick(31.0)
    assert bench.version == 0


def test_the_operator_is_told_once_for_each_buffer_that_it_lacks_devices(make: Make) -> None:
    bench = make(merge__min_devices=3, merge__max_wait_s=7.0)
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    began = bench.now
    bench.tick(2.0)
    deadlines = [bench.core.deadline]  # to tell; time alone merges nothing
    expected = (
        "1 accepted update of 1 device stays unmerged: a version is made of at least 3 devices (merge.min_devices); "
        "the ledger keeps them"
    )
    bench.now = began + 7.0
    assert logged(bench.tick()) == [expected]
    deadlines.append(bench.core.deadline)
    assert deadlines == [began + 7.0, None]
    assert logged(bench.tick(100.0)) == []
    bench.revoke("pi")
    assert bench.core.model.buffer == []
    bench.send(bench.join("other"), ternary_block(bench.schema, 2), 0)
    assert len(logged(bench.tick(7.0))) == 1


def test_a_stop_leaves_what_lacks_devices_to_the_next_start(make: Make) -> None:
    bench = sealed(make)
    pi, other = bench.join("pi"), bench.join("other")
    send(bench, pi, 1)
    actions = bench.handle(events.StopRequested())
    assert isinstance(actions[-1], events.Stop)
    assert bench.version == 0
    for _ in range(2):
        bench.restart()
        bench.start()
        assert [update.device for update in bench.core.model.buffer] == ["pi"]
        bench.tick(31.0)
        assert bench.version == 0
    send(bench, other, 2)
    assert bench.version == 1
    merged = bench.ledger.db.execute("SELECT device, merged FROM updates ORDER BY device").fetchall()
    assert merged == [("other", 1), ("pi", 1)]


def test_a_close_records_what_lacks_devices_as_unmerged_and_resuming_merges_it(make: Make) -> None:
    bench = sealed(make)
    pi, other = bench.join("pi"), bench.join("other")
    send(bench, pi, 1)
    actions = bench.handle(events.StateRequested(state="closed"))
    assert bench.version == 0
    assert [text.partition(":")[0] for text in logged(actions)] == [
        "the federation is closed",
        "1 accepted update of 1 device stays unmerged",
    ]
    assert logged(bench.tick(100.0)) == []  # it was told
    found = statuses.read(bench.directory)
    assert (found["state"], found["buffer"], found["counts"]["accepted"]) == ("closed", 1, 1)
    assert (found["counts"]["merged"], found["counts"]["unmerged"]) == (0, 1)
    bench.restart()
    bench.start()
    bench.tick(100.0)
    assert bench.version == 0
    bench.handle(events.StateRequested(state="open"))
    assert statuses.read(bench.directory)["counts"]["unmerged"] == 0
    send(bench, other, 2)
    assert bench.version == 1
    assert statuses.read(bench.directory)["counts"]["merged"] == 2


def test_a_close_merges_what_has_enough_devices(make: Make) -> None:
    bench = sealed(make)
    for number, name in enumerate(("a", "b")):
        send(bench, bench.join(name), number)
    bench.handle(events.StateRequested(state="closed"))
    assert bench.version == 1
    assert statuses.read(bench.directory)["counts"]["unmerged"] == 0


def test_a_revocation_that_leaves_too_few_devices_holds_the_rest_over(make: Make) -> None:
    bench = make(merge__min_devices=2, merge__buffer_size=3)
    a, b, c = (bench.join(name) for name in "abc")
    for number, device in enumerate((a, b)):
        bench.send(device, ternary_block(bench.schema, number), 0)
    bench.revoke("b")
    bench.tick(31.0)
    assert (bench.version, [update.device for update in bench.core.model.buffer]) == (0, ["a"])
    bench.send(c, ternary_block(bench.schema, 3), 0)
    assert bench.version == 1


def test_what_a_revoked_device_may_keep_still_counts(make: Make) -> None:
    bench = make(merge__min_devices=2)
    for number, name in enumerate("ab"):
        bench.send(bench.join(name), ternary_block(bench.schema, number), 0)
    bench.revoke("b", keep=True)
    bench.tick(31.0)
    assert bench.version == 1


def test_sealing_that_is_switched_on_holds_what_waits_already(make: Make) -> None:
    bench = make()
    bench.send(bench.join("pi"), ternary_block(bench.schema, 1), 0)
    reconfigure(bench, plan={"seal": True})
    bench.restart()
    bench.start()
    bench.tick(31.0)
    assert bench.version == 0
